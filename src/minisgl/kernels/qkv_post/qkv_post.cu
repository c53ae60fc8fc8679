// qkv_post: everything between the QKV product and attention, in one pass over its output: RMS norm of every query and
// key head (HAS_NORM), rotary embedding of both, keys and values into their cache slots, queries to q_out.
//
// Idea: the separate kernels (norm of q, norm of k, rotation, store) read and write the heads three times in four
// launches; here each head is read once and written once. A group of lanes owns WORK heads of one token, so a token's
// angles are fetched once for them. Weights are on their way before the wait for the QKV product.
// Expected: one launch of four, and two fifths of the bytes.
// Measured (H100, 16 + 2 × 8 heads of 128, µs at 1 / 64 / 256 / 1024 / 4096 tokens): 1.22 / 1.71 / 2.82 / 7.48 / 25.6,
// where store, rope and two norms of 1024 columns by themselves add up to 4.11 / 5.74 / 7.67 / 15.2 / 44.9.
#include "head.cuh"
#if FP8  // e4m3; before compute capability 8.9 the header converts by arithmetic
#include <cuda_fp8.h>
using Cache = __nv_fp8_e4m3;
template <>
__device__ inline Cache from_float<Cache>(float x) {
    return Cache(x);  // to the nearest, and to ±448 what is beyond
}
#else
using Cache = DTYPE;
#endif

using T = DTYPE;

extern "C" __global__ void qkv_post(const T* qkv, int64 qkv_stride, T* q_out, int64 q_stride, const T* q_weight,
                                    const T* k_weight, double eps, const float* cos_sin, const int* positions,
                                    Cache* k_cache, int64 k_slot_stride, Cache* v_cache, int64 v_slot_stride,
                                    const ID_T* slots, int64 num_slots, int64 tokens, const float* k_scale,
                                    const float* v_scale) {
    using Row = Head<T, HEAD_DIM>;
    constexpr int kHeads = NUM_Q + 2 * NUM_KV, kGroups = ceil_div(kHeads, WORK);  // groups of lanes a token
    const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x, group = thread / Row::kLanes;
    const int lane = thread % Row::kLanes, first = group % kGroups;  // heads first, first + kGroups, …
    const int64 token = group / kGroups;
    const bool live = token < tokens;  // nobody leaves before the sums, which need whole warps

    Row weight[WORK];
#pragma unroll
    for (int j = 0; HAS_NORM && j < WORK; ++j) {
        const int head = first + j * kGroups;
        if (head < NUM_Q + NUM_KV) weight[j].template load<true>(head < NUM_Q ? q_weight : k_weight, lane);
    }
    pdl::trigger();
    pdl::wait();

    Row x[WORK];
    Head<float, HEAD_DIM> angle;
    int64 slot = -1;
    if (live) {
        const int position = positions[token];
        slot = slots[token];
#pragma unroll
        for (int j = 0; j < WORK; ++j) {
            const int head = first + j * kGroups;
            if (head < kHeads) x[j].template load<false>(qkv + token * qkv_stride + head * HEAD_DIM, lane);
        }
        angle.load<true>(cos_sin + static_cast<int64>(position) * HEAD_DIM, lane);
    }
    const bool stored = static_cast<uint64>(slot) < static_cast<uint64>(num_slots);
#pragma unroll
    for (int j = 0; j < WORK; ++j) {
        const int head = first + j * kGroups;
        const float factor = HAS_NORM ? x[j].inverse_rms(eps) : 1.0f;
        if (!live || head >= kHeads) continue;
        if (head < NUM_Q + NUM_KV) {
            if (HAS_NORM) x[j].scale(factor, weight[j]);
            x[j].rotate(angle);
        }
        if (head < NUM_Q) {
            x[j].store(q_out + token * q_stride + head * HEAD_DIM, lane);
        } else if (stored) {
            const bool is_key = head < NUM_Q + NUM_KV;
            const int kv_head = (head - NUM_Q) % NUM_KV;
            Cache* row = is_key ? k_cache + slot * k_slot_stride : v_cache + slot * v_slot_stride;
            const float divisor = FP8 ? (is_key ? k_scale : v_scale)[kv_head] : 1.0f;
            x[j].store(row + kv_head * HEAD_DIM, lane, 1.0f / divisor);
        }
    }
}
