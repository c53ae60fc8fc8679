// store, shuffle: a warp serves GROUP tokens; it fetches their slots in one load and hands them around by shuffles.
//
// Idea: one request for the slots of several tokens instead of one each.
// Expected: nothing: the lanes of a warp that read one slot are one request already, and tokens now take turns.
// Measured on an H100, µs at 1 / 64 / 256 / 1024 tokens: 1.58 / 5.25 / 5.92 / 7.60 for v2's 1.08 / 1.42 / 1.85 / 4.20:
// a loss.
#include "store/ladder/staging.cuh"

extern "C" __global__ void store_shuffle(char* k_cache, int64 k_slot_stride, char* v_cache, int64 v_slot_stride,
                                         const char* k, int64 k_stride, const char* v, int64 v_stride,
                                         const ID_T* slots, int64 num_slots, int64 tokens) {
    const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
    const int64 first = static_cast<int64>(thread / kWarp) * GROUP;
    const int lane = thread % kWarp;
    pdl::wait();
    pdl::trigger();
    int64 mine = -1;
    if (lane < GROUP && first + lane < tokens) mine = slots[first + lane];
    for (int j = 0; j < GROUP; ++j) {
        const int64 slot = __shfl_sync(~0u, mine, j);  // -1 behind the last token
        if (!within(slot, num_slots)) continue;        // the same for every lane
        const int64 token = first + j;
        warp::copy<ROW_BYTES, VEC, kWarp, false>(k_cache + slot * k_slot_stride, k + token * k_stride, lane);
        warp::copy<ROW_BYTES, VEC, kWarp, false>(v_cache + slot * v_slot_stride, v + token * v_stride, lane);
    }
}
