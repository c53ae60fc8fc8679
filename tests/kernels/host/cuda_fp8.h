// e4m3 on the host: the nearest of its 127 sizes, the even one of two as near, 448 beyond.
#pragma once
#include "cuda_bf16.h"

struct __nv_fp8_e4m3 {
    uint8_t bits;

    static float size(int code) {
        const int exponent = code >> 3, fraction = code & 7;
        return exponent ? std::ldexp(8 + fraction, exponent - 10) : std::ldexp(fraction, -9);
    }
    __nv_fp8_e4m3() = default;
    explicit __nv_fp8_e4m3(float x) {
        const float wanted = std::fabs(x);
        int best = 0;
        for (int code = 1; code <= 0x7e; ++code) {
            const float now = std::fabs(size(code) - wanted), before = std::fabs(size(best) - wanted);
            if (now < before || (now == before && code % 2 == 0)) best = code;
        }
        bits = static_cast<uint8_t>(best | (std::signbit(x) ? 0x80 : 0));
    }
};
