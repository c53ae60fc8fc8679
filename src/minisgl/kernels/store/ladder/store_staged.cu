// store, staged: a warp a token; rows go through shared memory by ordinary loads and stores.
//
// Idea: what staging is for elsewhere: to reorder data between a coalesced read and a coalesced write. Here both are
// coalesced already, so this shows what the detour costs.
// Expected: nothing, or a loss of two passes through shared memory.
// Measured on an H100, µs at 1 / 64 / 256 / 1024 tokens: 1.63 / 2.24 / 2.55 / 4.39 for v2's 1.08 / 1.42 / 1.85 / 4.20:
// a loss.
#include "store/ladder/staging.cuh"

extern "C" __global__ void store_staged(char* k_cache, int64 k_slot_stride, char* v_cache, int64 v_slot_stride,
                                        const char* k, int64 k_stride, const char* v, int64 v_stride, const ID_T* slots,
                                        int64 num_slots, int64 tokens) {
    constexpr int kVecs = ROW_BYTES / 16;
    __shared__ uint4 stage[WARPS][2][kVecs];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int64 token = static_cast<int64>(blockIdx.x) * WARPS + warp;
    pdl::wait();
    pdl::trigger();
    if (token >= tokens) return;
    const auto* k_row = reinterpret_cast<const uint4*>(k + token * k_stride);
    const auto* v_row = reinterpret_cast<const uint4*>(v + token * v_stride);
    for (int i = lane; i < kVecs; i += kWarp) {
        stage[warp][0][i] = load(k_row + i);
        stage[warp][1][i] = load(v_row + i);
    }
    const int64 slot = slots[token];
    __syncwarp();
    if (!within(slot, num_slots)) return;
    auto* k_out = reinterpret_cast<uint4*>(k_cache + slot * k_slot_stride);
    auto* v_out = reinterpret_cast<uint4*>(v_cache + slot * v_slot_stride);
    for (int i = lane; i < kVecs; i += kWarp) {
        k_out[i] = stage[warp][0][i];
        v_out[i] = stage[warp][1][i];
    }
}
