// One attention head of one token in the registers of a group of lanes, for the kernels that normalise and rotate
// heads.
#pragma once
#include "common.cuh"

constexpr __device__ int next_power_of_two(int n) { return n <= 1 ? 1 : 2 * next_power_of_two((n + 1) / 2); }

// Element i and its rotation partner i + kDim / 2 lie in the same lane, so a rotation needs no exchange: lane l holds
// elements 4l … 4l + 3 of either half. kDim is a multiple of 8, at most 256.
template <typename T, int kDim>
struct Head {
    static constexpr int kHalf = kDim / 2, kLanes = next_power_of_two(kHalf / 4);
    float lo[4] = {}, hi[4] = {};

    __device__ static bool has(int lane) { return lane * 4 < kHalf; }

    template <bool kConst>
    __device__ void load(const T* p, int lane) {
        if (!has(lane)) return;
        const auto a = kConst ? Pack<T, 4>::load_const(p + lane * 4) : Pack<T, 4>::load(p + lane * 4);
        const auto b = kConst ? Pack<T, 4>::load_const(p + kHalf + lane * 4) : Pack<T, 4>::load(p + kHalf + lane * 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) lo[i] = to_float(a.v[i]), hi[i] = to_float(b.v[i]);
    }

    template <typename To>
    __device__ void store(To* p, int lane, float factor = 1.0f) const {
        if (!has(lane)) return;
        Pack<To, 4> a, b;
#pragma unroll
        for (int i = 0; i < 4; ++i) a.v[i] = from_float<To>(lo[i] * factor), b.v[i] = from_float<To>(hi[i] * factor);
        a.store(p + lane * 4);
        b.store(p + kHalf + lane * 4);
    }

    // 1 / sqrt(mean of squares + eps); every lane of the warp must call it.
    __device__ float inverse_rms(float eps) const {
        float squares = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) squares += lo[i] * lo[i] + hi[i] * hi[i];
        return rsqrtf(warp::sum<kLanes>(squares) / kDim + eps);
    }

    __device__ void scale(float factor, const Head& weight) {
#pragma unroll
        for (int i = 0; i < 4; ++i) lo[i] *= factor * weight.lo[i], hi[i] *= factor * weight.hi[i];
    }

    // (lo, hi) -> (lo cos - hi sin, hi cos + lo sin); `angle` holds cosines in lo and sines in hi.
    __device__ void rotate(const Head<float, kDim>& angle) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float a = lo[i], b = hi[i], c = angle.lo[i], s = angle.hi[i];
            lo[i] = a * c - b * s, hi[i] = b * c + a * s;
        }
    }
};
