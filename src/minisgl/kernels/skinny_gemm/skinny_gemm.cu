// skinny_gemm v3: out = x · Wᵀ for up to 64 rows of x, fused with what lies before and behind it.
//   NORM: x is RMS-normed first: its gain multiplies x, the factor 1 / rms, one for each row, the result.
//   GATED: W holds gate rows, then as many up rows: out = silu(gate) · up.
//   ADD: out += x · Wᵀ, the residual stream.
//
// Idea: the product is bound by the bytes of W, so each is read once, 16 at a time, straight into the registers that
// the tensor cores take it from, and the multiplications cost nothing at any batch. A block walks over the matrix,
// EIGHTS groups of eight rows at a time (GATED: of gate and of up by turns; a lone group leaves half of each mma empty,
// which costs nothing); its WARPS share the sum over k, and add up through shared memory in a fixed order.
// mma.m16n8k16 wants of each lane two pairs of neighbours in k, eight apart; but the order of a sum is free: a lane
// takes eight neighbours instead, which are the pairs of two mma, and takes the same of x. DEPTH such steps are in
// flight; the first ones' weights are loaded before the wait for the kernel that makes x, those of the next rows before
// the sums of these are added up. APART: a warp's steps in flight lie WARPS apart, else they are neighbours. Expected
// over v2, which has a block for a few rows and adds up its warps one after another: memory kept busy between blocks,
// and small matrices on all multiprocessors. Measured (H100, one row, µs, v2 / v3): Qwen3-0.6B's QKV 4.38 / 3.87,
// O 3.29 / 2.32, gate/up 5.66 / 4.91, down 5.08 / 3.12; Qwen3-8B's 23.0 / 20.1, 14.6 / 13.2, 80.0 / 73.3, 44.2 / 38.2.
#include "common.cuh"

using T = DTYPE;
constexpr int kStep = 32, kBatchTiles = ceil_div(BATCH, 8), kSteps = WIDTH / kStep, kStride = WARPS * DEPTH;
constexpr int kPairs = ceil_div(EIGHTS, 2), kRows = EIGHTS * 8, kOut = GATED ? kRows / 2 : kRows;
constexpr int kOutputs = GATED ? COLUMNS / 2 : COLUMNS;

__device__ inline void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPE "." MMA_TYPE
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

union Eight {  // elements, two a register
    uint4 raw;
    unsigned pair[4];
    T v[8];
};

__device__ inline void load_rows(Eight (&rows)[EIGHTS], const T* w, int column) {
#pragma unroll
    for (int e = 0; e < EIGHTS; ++e) {
        const int64 skip = GATED ? e / 2 * 8 + e % 2 * (COLUMNS / 2) : e * 8;
        rows[e].raw = load_const(reinterpret_cast<const uint4*>(w + skip * WIDTH + column));
    }
}

extern "C" __global__ void __launch_bounds__(WARPS* kWarp, RESIDENT)
    skinny_gemm(const T* x, int64 x_stride, const T* w, const T* norm, double eps, T* out, int64 out_stride,
                int64 rows) {
    __shared__ float total[WARPS][kBatchTiles * 8][kRows + 1];
    __shared__ float rms[WARPS][kBatchTiles * 8];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, group = lane / 4, quad = lane % 4;
    const int begin = APART ? warp : warp * DEPTH, slot = APART ? WARPS : 1;
    const T* mine = w + (static_cast<int64>(blockIdx.x) * kOut + group) * WIDTH + quad * 8;
    Eight next[DEPTH][EIGHTS];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d)
        if (begin + d * slot < kSteps) load_rows(next[d], mine, (begin + d * slot) * kStep);
    pdl::trigger();
    pdl::wait();
    for (int place = blockIdx.x * kOut; place < kOutputs; place += gridDim.x * kOut) {
        const bool more = place + static_cast<int>(gridDim.x) * kOut < kOutputs;
        const T* following = mine + static_cast<int64>(gridDim.x) * kOut * WIDTH;
        float sum[kPairs][kBatchTiles][4] = {}, squares[kBatchTiles] = {};
        for (int first = begin; first < kSteps; first += kStride) {
            Eight input[DEPTH][kBatchTiles], gain[DEPTH];
#pragma unroll
            for (int d = 0; d < DEPTH; ++d) {
                const int step = first + d * slot, column = step * kStep + quad * 8;
                if (NORM && step < kSteps) gain[d].raw = load_const(reinterpret_cast<const uint4*>(norm + column));
#pragma unroll
                for (int b = 0; b < kBatchTiles; ++b) {
                    const int row = b * 8 + group;
                    const T* p = x + row * x_stride + column;
                    input[d][b].raw = {};
                    if (row < rows && step < kSteps) input[d][b].raw = load(reinterpret_cast<const uint4*>(p));
                }
            }
#pragma unroll
            for (int d = 0; d < DEPTH; ++d) {
                const int step = first + d * slot;
                if (step >= kSteps) continue;
#pragma unroll
                for (int b = 0; b < kBatchTiles; ++b) {
                    Eight& in = input[d][b];
#pragma unroll
                    for (int i = 0; NORM && i < 8; ++i) {
                        const float value = to_float(in.v[i]);
                        squares[b] += value * value;
                        in.v[i] = from_float<T>(value * to_float(gain[d].v[i]));
                    }
#pragma unroll
                    for (int p = 0; p < kPairs; ++p) {
                        const bool both = 2 * p + 1 < EIGHTS;
                        const Eight& lo = next[d][2 * p];
                        const Eight& hi = next[d][both ? 2 * p + 1 : 2 * p];
#pragma unroll
                        for (int h = 0; h < 4; h += 2) {
                            const unsigned a[4] = {lo.pair[h], both ? hi.pair[h] : 0, lo.pair[h + 1],
                                                   both ? hi.pair[h + 1] : 0};
                            multiply(sum[p][b], a, in.pair[h], in.pair[h + 1]);
                        }
                    }
                }
                if (step + kStride < kSteps) {
                    load_rows(next[d], mine, (step + kStride) * kStep);
                } else if (more) {
                    load_rows(next[d], following, (begin + d * slot) * kStep);
                }
            }
        }

        // All warps' sums into shared memory. A lane holds rows `group` of two groups of the block's, for batch rows
        // 2 · quad and 2 · quad + 1; its squares are of batch row `group`.
#pragma unroll
        for (int b = 0; b < kBatchTiles; ++b) {
            if (NORM) squares[b] = warp::sum<4>(squares[b]);
            if (NORM && quad == 0) rms[warp][b * 8 + group] = squares[b];
#pragma unroll
            for (int i = 0; i < kPairs * 4; ++i) {
                const int p = i / 4, which = 2 * p + i % 4 / 2;
                if (which < EIGHTS) total[warp][b * 8 + 2 * quad + i % 2][which * 8 + group] = sum[p][b][i % 4];
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < rows * kOut; i += WARPS * kWarp) {
            const int row = i / kOut, column = i % kOut, at = GATED ? column / 8 * 16 + column % 8 : column;
            float y = 0, up = 0, square = 0;
#pragma unroll
            for (int s = 0; s < WARPS; ++s) {
                y += total[s][row][at];
                if (GATED) up += total[s][row][at + 8];
                if (NORM) square += rms[s][row];
            }
            const float factor = NORM ? rsqrtf(square / WIDTH + static_cast<float>(eps)) : 1.0f;
            y *= factor;
            if (GATED) y = __fdividef(y, 1.0f + expf(-y)) * up * factor;
            T* p = out + row * out_stride + place + column;
            *p = from_float<T>(ADD ? y + to_float(load(p)) : y);
        }
        __syncthreads();
        mine = following;
    }
}
