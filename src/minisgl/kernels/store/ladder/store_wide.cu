// store, wide: as v2, but a lane moves 32 neighbouring bytes instead of 16.
//
// Idea: fewer, larger accesses a lane. One instruction moves 16 bytes at most on these architectures, so 32 are two,
// and a warp's 1,024 bytes come as two requests of 512 with gaps instead of two without. Expected: nothing, or a loss:
// 16 bytes a lane already make whole 128-byte lines. Measured on an H100, µs at 1 / 64 / 256 / 1024 tokens: 1.20 /
// 1.42 / 1.89 / 4.23 for v2's 1.08 / 1.42 / 1.85 / 4.20.
#include "store/ladder/staging.cuh"

extern "C" __global__ void store_wide(char* k_cache, int64 k_slot_stride, char* v_cache, int64 v_slot_stride,
                                      const char* k, int64 k_stride, const char* v, int64 v_stride, const ID_T* slots,
                                      int64 num_slots, int64 tokens) {
    constexpr int kVecs = ROW_BYTES / 16, kPairs = ceil_div(kVecs, 2), kPieces = ceil_div(kPairs, kWarp);
    const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x, group = thread / kWarp;
    const int64 token = group / (2 * kPieces);
    const bool is_value = group / kPieces % 2;
    const int i = 2 * (group % kPieces * kWarp + thread % kWarp);  // the first of the lane's two vectors
    pdl::wait();
    pdl::trigger();
    if (token >= tokens) return;
    const auto* row = reinterpret_cast<const uint4*>(is_value ? v + token * v_stride : k + token * k_stride);
    uint4 a = {}, b = {};
    if (i < kVecs) a = load(row + i);
    if (i + 1 < kVecs) b = load(row + i + 1);
    const int64 slot = slots[token];
    const int end = within(slot, num_slots) ? kVecs : 0;
    auto* out = reinterpret_cast<uint4*>(is_value ? v_cache + slot * v_slot_stride : k_cache + slot * k_slot_stride);
    if (i < end) out[i] = a;
    if (i + 1 < end) out[i + 1] = b;
}
