// rmsnorm v2: out = x / sqrt(mean(x²) + eps) · weight, a row at a time; with ADD, residual += x comes first and the sum
// (rounded to T, as it is stored) is what gets normalised.
//
// Idea: a row stays in the registers of ROW_THREADS threads (COUNT vectors each), so it is read once. Narrow rows share
// a warp, wide ones span several and add their sums through shared memory. The weights are fetched before the wait for
// the kernel that makes x.
// Expected over v1 (Triton, which also reads once): 0.3 µs from dependent launch, and the latency of the weights.
// Measured (H100, rows of 2 KiB, µs at 1 / 64 / 1024 / 16384 rows): 0.97 / 1.33 / 2.60 / 23.6 against 1.41 / 1.93
// / 2.98 / 24.3; with ADD 1.04 / 1.57 / 4.10 / 46.4 against 1.60 / 2.08 / 4.45 / 46.6.
#include "common.cuh"

using T = DTYPE;

extern "C" __global__ void rmsnorm(const T* x, int64 x_stride, T* residual, int64 residual_stride, const T* weight,
                                   double eps, T* out, int64 out_stride, int64 rows) {
    using V = Pack<T, VEC>;
    constexpr int kVecs = WIDTH / VEC, kWarps = ceil_div(ROW_THREADS, kWarp);
    const int lane = threadIdx.x % ROW_THREADS;
    const int64 row = static_cast<int64>(blockIdx.x) * (blockDim.x / ROW_THREADS) + threadIdx.x / ROW_THREADS;
    const bool live = row < rows;  // nobody leaves before the sum, which needs whole warps
    V w[COUNT], r[COUNT];
    float value[COUNT][VEC], squares = 0;
#pragma unroll
    for (int j = 0; j < COUNT; ++j) {
        const int i = lane + j * ROW_THREADS;
        if (i < kVecs) w[j] = V::load_const(weight + i * VEC);
    }
    const bool few = gridDim.x <= 128;  // less than a block a multiprocessor: no pile-up to fear
    if (few) pdl::trigger();
    pdl::wait();
    if (!few) pdl::trigger();
#pragma unroll
    for (int j = 0; j < COUNT; ++j) {
        const int i = lane + j * ROW_THREADS;
        V a = {};
        r[j] = {};
        if (live && i < kVecs) {
            a = V::load(x + row * x_stride + i * VEC);
            if (ADD) r[j] = V::load(residual + row * residual_stride + i * VEC);
        }
#pragma unroll
        for (int n = 0; n < VEC; ++n) value[j][n] = to_float(a.v[n]);
    }
#pragma unroll
    for (int j = 0; j < COUNT; ++j) {
        const int i = lane + j * ROW_THREADS;
#pragma unroll
        for (int n = 0; n < VEC; ++n) {
            if (ADD) value[j][n] = to_float(r[j].v[n] = from_float<T>(value[j][n] + to_float(r[j].v[n])));
            squares += value[j][n] * value[j][n];
        }
        if (ADD && live && i < kVecs) r[j].store(residual + row * residual_stride + i * VEC);
    }
    squares = warp::sum < ROW_THREADS<kWarp ? ROW_THREADS : kWarp>(squares);
    if (kWarps > 1) {  // then a block holds one row
        __shared__ float partial[kWarps];
        if (lane % kWarp == 0) partial[lane / kWarp] = squares;
        __syncthreads();
        squares = 0;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) squares += partial[i];
    }
    const float factor = rsqrtf(squares / WIDTH + static_cast<float>(eps));
#pragma unroll
    for (int j = 0; j < COUNT; ++j) {
        const int i = lane + j * ROW_THREADS;
        if (!live || i >= kVecs) continue;
        V y;
#pragma unroll
        for (int n = 0; n < VEC; ++n) y.v[n] = from_float<T>(value[j][n] * factor * to_float(w[j].v[n]));
        y.store(out + row * out_stride + i * VEC);
    }
}
