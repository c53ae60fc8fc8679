// store_norm: keys and values into their slots and the next residual addition with RMS norm, in one launch.
//
// Idea: 'store and the next RMSNorm are worth fusing': two small kernels become one. A block has one token: it asks for
// its key, value, activation and residual rows together, sums the squares, and writes all of them. In a model attention
// lies between the two and reads what the store wrote, so the engine could only do this with a norm that doesn't depend
// on it. What is measured is the most that the fusion could give: a launch. Expected: the launch of one kernel (0.5 µs
// behind another with dependent launch) up to some 64 tokens, nothing beyond. Measured on an H100,
// interleaved with the two in turn over all sizes: 37% faster (35 to 40): 66% at 1 token, 3% at 1024.
#include "store/ladder/staging.cuh"

using T = DTYPE;

extern "C" __global__ void store_norm(char* k_cache, int64 k_slot_stride, char* v_cache, int64 v_slot_stride,
                                      const char* k, int64 k_stride, const char* v, int64 v_stride, const ID_T* slots,
                                      int64 num_slots, const T* x, int64 x_stride, T* residual, int64 residual_stride,
                                      const T* weight, double eps, T* out, int64 out_stride) {
    constexpr int kElements = 16 / sizeof(T), kCount = ceil_div(WIDTH / kElements, THREADS);
    constexpr int kRowVecs = ROW_BYTES / 16, kMoved = ceil_div(2 * kRowVecs, THREADS);
    using V = Pack<T, kElements>;
    const int64 token = blockIdx.x;
    const int thread = threadIdx.x;
    V w[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
        const int i = thread + j * THREADS;
        if (i < WIDTH / kElements) w[j] = V::load_const(weight + i * kElements);
    }
    pdl::wait();
    pdl::trigger();

    uint4 moved[kMoved];  // vectors of the key row, then of the value row
#pragma unroll
    for (int j = 0; j < kMoved; ++j) {
        const int i = thread + j * THREADS;
        if (i < kRowVecs)
            moved[j] = load(reinterpret_cast<const uint4*>(k + token * k_stride) + i);
        else if (i < 2 * kRowVecs)
            moved[j] = load(reinterpret_cast<const uint4*>(v + token * v_stride) + i - kRowVecs);
    }
    V r[kCount];
    float squares = 0;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
        const int i = thread + j * THREADS;
        if (i >= WIDTH / kElements) continue;
        const V a = V::load(x + token * x_stride + i * kElements);
        r[j] = V::load(residual + token * residual_stride + i * kElements);
#pragma unroll
        for (int n = 0; n < kElements; ++n) {
            r[j].v[n] = from_float<T>(to_float(a.v[n]) + to_float(r[j].v[n]));
            squares += to_float(r[j].v[n]) * to_float(r[j].v[n]);
        }
        r[j].store(residual + token * residual_stride + i * kElements);
    }
    const int64 slot = slots[token];
    if (within(slot, num_slots)) {
#pragma unroll
        for (int j = 0; j < kMoved; ++j) {
            const int i = thread + j * THREADS;
            if (i < kRowVecs)
                reinterpret_cast<uint4*>(k_cache + slot * k_slot_stride)[i] = moved[j];
            else if (i < 2 * kRowVecs)
                reinterpret_cast<uint4*>(v_cache + slot * v_slot_stride)[i - kRowVecs] = moved[j];
        }
    }
    __shared__ float partial[THREADS / kWarp];
    squares = warp::sum<kWarp>(squares);
    if (thread % kWarp == 0) partial[thread / kWarp] = squares;
    __syncthreads();
    squares = 0;
#pragma unroll
    for (int i = 0; i < THREADS / kWarp; ++i) squares += partial[i];
    const float factor = rsqrtf(squares / WIDTH + static_cast<float>(eps));
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
        const int i = thread + j * THREADS;
        if (i >= WIDTH / kElements) continue;
        V y;
#pragma unroll
        for (int n = 0; n < kElements; ++n) y.v[n] = from_float<T>(to_float(r[j].v[n]) * factor * to_float(w[j].v[n]));
        y.store(out + token * out_stride + i * kElements);
    }
}
