// store v3: a warp a token; both rows on their way to shared memory by asynchronous copies before anything waits.
//
// Idea: cp.async needs no registers, so a key and a value row of any width are in flight at once, together with the
// slot. Expected over v1: a memory latency (the slot no longer comes first) and the turn-taking of K and V, 15%; over
// v2, which has both from registers, nothing. Measured on an H100 over all
// sizes: 16% faster than one after the other; 1.24 / 1.58 / 1.95 / 4.08 µs at 1 / 64 / 256 / 1024 tokens for v2's 1.08
// / 1.42 / 1.85 / 4.20; at 4096 15.9 for 12.4. A bulk copy by one thread
// (cp.async.bulk) was: 0.3 µs slower at one token, 5 to 10% slower at 1024 and 4096 than v2 (H100).
#include "store/ladder/staging.cuh"

extern "C" __global__ void store_v3(char* k_cache, int64 k_slot_stride, char* v_cache, int64 v_slot_stride,
                                    const char* k, int64 k_stride, const char* v, int64 v_stride, const ID_T* slots,
                                    int64 num_slots, int64 tokens) {
    constexpr int kVecs = ROW_BYTES / 16;
    __shared__ uint4 stage[WARPS][2][kVecs];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int64 token = static_cast<int64>(blockIdx.x) * WARPS + warp;
    pdl::wait();
    pdl::trigger();
    if (token >= tokens) return;  // the whole warp; no barrier of the block comes later
    const auto* k_row = reinterpret_cast<const uint4*>(k + token * k_stride);
    const auto* v_row = reinterpret_cast<const uint4*>(v + token * v_stride);
    for (int i = lane; i < kVecs; i += kWarp) {
        copy_async(&stage[warp][0][i], k_row + i);
        copy_async(&stage[warp][1][i], v_row + i);
    }
    const int64 slot = slots[token];
    wait_async();  // a lane reads back only what it copied itself, so nobody else is waited for
    if (!within(slot, num_slots)) return;
    auto* k_out = reinterpret_cast<uint4*>(k_cache + slot * k_slot_stride);
    auto* v_out = reinterpret_cast<uint4*>(v_cache + slot * v_slot_stride);
    for (int i = lane; i < kVecs; i += kWarp) {
        k_out[i] = stage[warp][0][i];
        v_out[i] = stage[warp][1][i];
    }
}
