// index v3 (compute capability 9.0 on): the bulk copy engine moves whole rows through shared memory.
//
// Idea: one thread asks for a row with a single instruction, so no registers hold data in flight and a multiprocessor
// keeps as many rows in flight as fit its shared memory. Pays where bandwidth is the limit; adds a hop at small batches.
#include "bulk.cuh"

extern "C" __global__ void index_v3(char* out, int64 out_stride, const char* table, int64 table_stride, const ID_T* ids,
                                    int64 start, int64 length, int64 tokens) {
#if __CUDA_ARCH__ >= 900
  __shared__ alignas(128) char buffer[WORK * ROW_BYTES];
  __shared__ bulk::Barrier arrived[WORK];
  const int j = threadIdx.x;  // one thread a row
  const int64 row = static_cast<int64>(blockIdx.x) * WORK + j;
  pdl::trigger();
  pdl::wait();
  if (j >= WORK || row >= tokens) return;
  const int64 id = ids[row] - start;
  char *mine = buffer + j * ROW_BYTES, *dst = out + row * out_stride;
  if (static_cast<uint64>(id) < static_cast<uint64>(length)) {
    arrived[j].init();
    bulk::load<ROW_BYTES>(mine, table + id * table_stride, arrived[j]);
    arrived[j].wait();
    bulk::store<ROW_BYTES>(dst, mine);
    bulk::finish();
  } else {
#pragma unroll 1
    for (int i = 0; i < ROW_BYTES / 16; ++i) reinterpret_cast<uint4*>(dst)[i] = uint4{};
  }
#endif
}
