// store v1: writes this step's keys and values to their cache slots; slots outside [0, num_slots) (-1 among them)
// write nothing.
//
// Idea: one launch for both, a warp a token: first its key row, then its value row. The slot is read first and the rows
// wait for it. Expected: nothing: it is the baseline.
// Measured (H100, rows of 2 KiB, µs at 1 / 64 / 256 / 1024 / 4096 / 16384 tokens): 1.75 / 2.65 / 3.10 / 5.05 / 13.9
// / 49.5.
#include "common.cuh"

extern "C" __global__ void store_v1(char* k_cache, int64 k_slot_stride, char* v_cache, int64 v_slot_stride,
                                    const char* k, int64 k_stride, const char* v, int64 v_stride, const ID_T* slots,
                                    int64 num_slots, int64 tokens) {
    const int64 token = (static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
    const int lane = threadIdx.x % kWarp;
    pdl::wait();
    pdl::trigger();
    if (token >= tokens) return;
    const int64 slot = slots[token];
    if (static_cast<uint64>(slot) >= static_cast<uint64>(num_slots)) return;
    warp::copy<ROW_BYTES, VEC, kWarp, false>(k_cache + slot * k_slot_stride, k + token * k_stride, lane);
    warp::copy<ROW_BYTES, VEC, kWarp, false>(v_cache + slot * v_slot_stride, v + token * v_stride, lane);
}
