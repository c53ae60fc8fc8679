// index v1: rows of a table by id; out[t] = table[ids[t] - start], zeros where the id is outside [start, start +
// length).
//
// Idea: a row is split over SPLITS warps by its width alone, blocks have 128 threads; 16-byte vectors, coalesced.
// Suspected weakness: the batch has no say, so at batch 1 one block works and 131 multiprocessors idle.
// Expected: nothing: it is the baseline.
// Measured (H100, rows of 8 KiB, µs at 1 / 64 / 256 / 1024 / 4096 / 16384 rows): 1.52 / 2.31 / 3.56 / 8.03 / 25.4
// / 94.7.
#include "common.cuh"

extern "C" __global__ void index_v1(char* out, int64 out_stride, const char* table, int64 table_stride, const ID_T* ids,
                                    int64 start, int64 length, int64 tokens) {
    constexpr int kBytes = ROW_BYTES / SPLITS;
    const unsigned group = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
    const int lane = threadIdx.x % kWarp;
    const int64 row = group / SPLITS, offset = group % SPLITS * kBytes;
    pdl::wait();
    pdl::trigger();
    if (row >= tokens) return;
    const int64 id = ids[row] - start;
    char* dst = out + row * out_stride + offset;
    if (static_cast<uint64>(id) < static_cast<uint64>(length)) {
        warp::copy<kBytes, VEC, kWarp, true>(dst, table + id * table_stride + offset, lane);
    } else {
        for (int i = lane; i < kBytes / VEC; i += kWarp) reinterpret_cast<Vec<VEC>*>(dst)[i] = Vec<VEC>{};
    }
}
