// store v3 (compute capability 9.0 on): the bulk copy engine moves whole key and value rows through shared memory.
//
// Idea: as index v3: one thread a row, no registers hold data in flight.
#include "bulk.cuh"

extern "C" __global__ void store_v3(char* k_cache, int64 k_slot_stride, char* v_cache, int64 v_slot_stride,
                                    const char* k, int64 k_stride, const char* v, int64 v_stride, const ID_T* slots,
                                    int64 num_slots, int64 tokens) {
#if __CUDA_ARCH__ >= 900
  __shared__ alignas(128) char buffer[2 * WORK * ROW_BYTES];
  __shared__ bulk::Barrier arrived[2 * WORK];
  const int j = threadIdx.x;  // one thread a row: the key rows of WORK tokens, then their value rows
  const bool is_value = j >= WORK;
  const int64 token = static_cast<int64>(blockIdx.x) * WORK + j % WORK;
  pdl::trigger();
  pdl::wait();
  if (j >= 2 * WORK || token >= tokens) return;
  char* mine = buffer + j * ROW_BYTES;
  arrived[j].init();
  bulk::load<ROW_BYTES>(mine, is_value ? v + token * v_stride : k + token * k_stride, arrived[j]);
  const int64 slot = slots[token];
  arrived[j].wait();
  if (static_cast<uint64>(slot) >= static_cast<uint64>(num_slots)) return;
  bulk::store<ROW_BYTES>(is_value ? v_cache + slot * v_slot_stride : k_cache + slot * k_slot_stride, mine);
  bulk::finish();
#endif
}
