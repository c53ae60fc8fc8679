// skinny_gemm v2: out = x · Wᵀ for up to 64 rows of x, fused with what lies before and behind it.
//   NORM: x is RMS-normed first: its gain multiplies x, the factor 1 / rms, one for each row, the result.
//   GATED: W holds gate rows, then as many up rows: out = silu(gate) · up.
//   ADD: out += x · Wᵀ, the residual stream.
//
// Idea: the product is bound by the bytes of W, so each is read once, 16 at a time, straight into the registers that
// the tensor cores take it from, and the multiplications cost nothing at any batch. A block has TILES × 16 rows of W;
// its WARPS share the sum over k, and add up through shared memory in a fixed order. mma.m16n8k16 wants of each lane
// two pairs of neighbours in k, eight apart; but the order of a sum is free: a lane takes eight neighbours instead,
// which are the pairs of two mma, and takes the same of x. DEPTH such steps are in flight, and the first ones' weights
// are loaded before the wait for the kernel that makes x.
// Measured (H100, one row, µs, cuBLAS / v2): Qwen3-0.6B's QKV 7.01 / 4.38, O 5.74 / 3.29, gate/up 9.13 / 5.66,
// down 7.04 / 5.08; Qwen3-8B's 22.6 / 23.0, 15.5 / 14.6, 75.0 / 80.0, 39.0 / 44.2: v3's reason.
#include "common.cuh"

using T = DTYPE;
constexpr int kStep = 32, kBatchTiles = ceil_div(BATCH, 8), kSteps = WIDTH / kStep;

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

// The weights of one step: rows `row` and `row` + 8 of each tile.
struct Weights {
    Eight lo[TILES], hi[TILES], gain;

    __device__ void load(const T* w, const T* norm, int column) {
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
            const int skip = GATED ? t / 2 * 16 + t % 2 * (COLUMNS / 2) : t * 16;  // tiles of gate and up take turns
            lo[t].raw = load_const(reinterpret_cast<const uint4*>(w + static_cast<int64>(skip) * WIDTH + column));
            hi[t].raw = load_const(reinterpret_cast<const uint4*>(w + static_cast<int64>(skip + 8) * WIDTH + column));
        }
        if (NORM) gain.raw = load_const(reinterpret_cast<const uint4*>(norm + column));
    }
};

extern "C" __global__ void __launch_bounds__(WARPS* kWarp)
    skinny_gemm(const T* x, int64 x_stride, const T* w, const T* norm, double eps, T* out, int64 out_stride,
                int64 rows) {
    constexpr int kOut = GATED ? TILES / 2 * 16 : TILES * 16;  // of the output, a block
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, group = lane / 4, quad = lane % 4;
    const T* mine = w + (static_cast<int64>(blockIdx.x) * kOut + group) * WIDTH;
    float sum[TILES][kBatchTiles][4] = {}, squares[kBatchTiles] = {};
    Weights next[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
        const int step = warp + d * WARPS;
        if (step < kSteps) next[d].load(mine, norm, step * kStep + quad * 8);
    }
    pdl::trigger();
    pdl::wait();
    for (int first = warp; first < kSteps; first += DEPTH * WARPS) {
        Eight input[DEPTH][kBatchTiles];
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
#pragma unroll
            for (int b = 0; b < kBatchTiles; ++b) {
                const int row = b * 8 + group, step = first + d * WARPS;
                const T* p = x + row * x_stride + step * kStep + quad * 8;
                input[d][b].raw = {};
                if (row < rows && step < kSteps) input[d][b].raw = load(reinterpret_cast<const uint4*>(p));
            }
        }
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            const int step = first + d * WARPS;
            if (step >= kSteps) break;
            const Weights now = next[d];
            if (step + DEPTH * WARPS < kSteps) next[d].load(mine, norm, (step + DEPTH * WARPS) * kStep + quad * 8);
#pragma unroll
            for (int b = 0; b < kBatchTiles; ++b) {
                Eight& in = input[d][b];
#pragma unroll
                for (int i = 0; NORM && i < 8; ++i) {
                    const float value = to_float(in.v[i]);
                    squares[b] += value * value;
                    in.v[i] = from_float<T>(value * to_float(now.gain.v[i]));
                }
#pragma unroll
                for (int t = 0; t < TILES; ++t) {
#pragma unroll
                    for (int h = 0; h < 4; h += 2) {
                        const unsigned a[4] = {now.lo[t].pair[h], now.hi[t].pair[h], now.lo[t].pair[h + 1],
                                               now.hi[t].pair[h + 1]};
                        multiply(sum[t][b], a, in.pair[h], in.pair[h + 1]);
                    }
                }
            }
        }
    }

    // The sums of all warps, one after another into shared memory. A lane holds output columns `group` and `group` + 8
    // of batch rows 2 · quad and 2 · quad + 1; its squares are of batch row `group`.
    __shared__ float total[kBatchTiles * 8][TILES * 16 + 1];
    __shared__ float rms[kBatchTiles * 8];
    for (int turn = 0; turn < WARPS; ++turn) {
        for (int b = 0; warp == turn && b < kBatchTiles; ++b) {
            if (NORM) squares[b] = warp::sum<4>(squares[b]);
            if (NORM && quad == 0) rms[b * 8 + group] = squares[b] + (turn ? rms[b * 8 + group] : 0);
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float& place = total[b * 8 + 2 * quad + i % 2][t * 16 + group + i / 2 * 8];
                    place = sum[t][b][i] + (turn ? place : 0);
                }
            }
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < rows * kOut; i += WARPS * kWarp) {
        const int row = i / kOut, column = i % kOut, place = GATED ? column / 16 * 32 + column % 16 : column;
        const float factor = NORM ? rsqrtf(rms[row] / WIDTH + static_cast<float>(eps)) : 1.0f;
        float y = total[row][place] * factor;
        if (GATED) y = __fdividef(y, 1.0f + expf(-y)) * total[row][place + 16] * factor;
        T* p = out + row * out_stride + static_cast<int64>(blockIdx.x) * kOut + column;
        *p = from_float<T>(ADD ? y + to_float(load(p)) : y);
    }
}
