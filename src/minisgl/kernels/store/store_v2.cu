// store v2: as v1, but a row is split by batch and GPU, and data doesn't wait for the slot.
//
// Idea: a group of LANES lanes moves one piece of a key or a value row. It asks for its data and for the slot together
// (the source doesn't depend on the slot), so one memory latency of two is gone; keys and values no longer take turns.
// Expected: 0.5 to 0.8 µs less at any size (a latency), and 0.3 µs from dependent launch.
// Measured: 1.25 / 1.79 / 2.52 / 4.55 / 12.8 / 48.5 without dependent launch, 1.04 / 1.38 / 2.10 / 4.15 / 12.5 / 48.3
// with it; triggering behind the wait and tuned anew 1.08 / 1.42 / 1.85 / 4.20 / 12.4 / 47.9 (another run, float16).
#include "common.cuh"

extern "C" __global__ void store_v2(char* k_cache, int64 k_slot_stride, char* v_cache, int64 v_slot_stride,
                                    const char* k, int64 k_stride, const char* v, int64 v_stride, const ID_T* slots,
                                    int64 num_slots, int64 tokens) {
    constexpr int kVecs = ROW_BYTES / VEC, kPieces = ceil_div(kVecs, LANES * WORK);
    const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x, group = thread / LANES;
    const int64 token = group / (2 * kPieces);
    const bool is_value = group / kPieces % 2;
    const int first = group % kPieces * (LANES * WORK) + thread % LANES;
    pdl::wait();
    pdl::trigger();
    if (token >= tokens) return;
    warp::Piece<VEC, LANES, WORK> piece;
    piece.template load<false>(is_value ? v + token * v_stride : k + token * k_stride, first, kVecs);
    const int64 slot = slots[token];
    // No early exit here: the compiler would move the loads behind it, and they would wait for the slot after all.
    const int end = static_cast<uint64>(slot) < static_cast<uint64>(num_slots) ? kVecs : 0;
    piece.store(is_value ? v_cache + slot * v_slot_stride : k_cache + slot * k_slot_stride, first, end);
}
