// rope v2: rotary embedding of every query and key head, in place, angles from a table.
//
// Idea: one launch for q and k; a group of lanes owns WORK heads of one token and fetches the token's angles once.
// Expected over v1 (Triton, a program a head): the same bytes in far fewer blocks, so bandwidth instead of block
// starts. Measured (H100, 16 + 8 heads of 128, µs at 1 / 64 / 1024 / 16384 tokens): 1.13 / 1.70 / 5.82 / 71.5
// against 1.42 / 2.24 / 16.2 / 240.
#include "head.cuh"

using T = DTYPE;

extern "C" __global__ void rope(T* q, int64 q_stride, T* k, int64 k_stride, const float* cos_sin, const int* positions,
                                int64 tokens) {
    using Row = Head<T, HEAD_DIM>;
    constexpr int kHeads = NUM_Q + NUM_KV, kGroups = ceil_div(kHeads, WORK);
    const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x, group = thread / Row::kLanes;
    const int lane = thread % Row::kLanes, first = group % kGroups;
    const int64 token = group / kGroups;
    pdl::trigger();
    pdl::wait();
    if (token >= tokens) return;
    const int position = positions[token];
    const auto at = [&](int head) {
        return head < NUM_Q ? q + token * q_stride + head * HEAD_DIM : k + token * k_stride + (head - NUM_Q) * HEAD_DIM;
    };
    Row x[WORK];
#pragma unroll
    for (int j = 0; j < WORK; ++j) {
        if (first + j * kGroups < kHeads) x[j].template load<false>(at(first + j * kGroups), lane);
    }
    Head<float, HEAD_DIM> angle;
    angle.load<true>(cos_sin + static_cast<int64>(position) * HEAD_DIM, lane);
#pragma unroll
    for (int j = 0; j < WORK; ++j) {
        if (first + j * kGroups >= kHeads) continue;
        x[j].rotate(angle);
        x[j].store(at(first + j * kGroups), lane);
    }
}
