// index v2: as v1, but the batch and the GPU decide how finely a row is split; dependent launch.
//
// Idea: a group of LANES lanes moves one piece of LANES × WORK vectors. Small batches spread even one row over several
// multiprocessors; large ones keep more loads in flight for each id fetched. The ids are on their way to L2 before the
// wait for the kernel that may have written them.
// Expected: 0.1 to 0.2 µs less at batch 1 to 64 from the split, 0.3 µs from dependent launch.
// Measured: the split alone gains nothing (1.56 / 2.45 / 3.78 / 8.14 / 25.6 / 94.7): one multiprocessor moves 8 KiB as
// fast as sixteen, what counts are the two memory latencies, one after the other. Dependent launch with early ids gives
// 1.20 / 1.88 / 3.11 / 7.57 / 25.0 / 93.9; triggering behind the wait another 0.05 to 0.1 µs up to 256 rows.
#include "common.cuh"

extern "C" __global__ void index_v2(char* out, int64 out_stride, const char* table, int64 table_stride, const ID_T* ids,
                                    int64 start, int64 length, int64 tokens) {
    constexpr int kVecs = ROW_BYTES / VEC, kPieces = ceil_div(kVecs, LANES * WORK);
    const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x, group = thread / LANES;
    const int64 row = group / kPieces;
    const int first = group % kPieces * (LANES * WORK) + thread % LANES;
    if (row < tokens) prefetch(ids + row);
    pdl::wait();
    pdl::trigger();
    if (row >= tokens) return;
    const int64 id = ids[row] - start;
    warp::Piece<VEC, LANES, WORK> piece = {};
    if (static_cast<uint64>(id) < static_cast<uint64>(length)) {
        piece.template load<true>(table + id * table_stride, first, kVecs);
    }
    piece.store(out + row * out_stride, first, kVecs);
}
