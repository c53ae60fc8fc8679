// What the kernels need of CUDA, on the host: 16-bit types, a thread of the machine for each thread of a block.
#pragma once
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};
struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct Index {
    unsigned x;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline thread_local Index threadIdx;
inline Index blockIdx, blockDim, gridDim;

inline float __bfloat162float(__nv_bfloat16 x) {
    const uint32_t bits = uint32_t{x.bits} << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) {
    _Float16 y;
    std::memcpy(&y, &x, 2);
    return static_cast<float>(y);
}
inline __half __float2half_rn(float x) {
    const _Float16 y = static_cast<_Float16>(x);
    __half z;
    std::memcpy(&z, &y, 2);
    return z;
}
template <typename V>
V __ldg(const V* p) {
    return *p;
}
template <typename V>
V __ldcg(const V* p) {
    return *p;
}
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

struct Warp {
    std::barrier<> barrier{32};
    float value[32];
    long long whole[32];
    unsigned a[32][4], b[32][2];
};
inline std::unique_ptr<std::barrier<>> block_barrier;
inline std::vector<std::unique_ptr<Warp>> warps;
inline void __syncthreads() { block_barrier->arrive_and_wait(); }
inline void __syncwarp() { warps[threadIdx.x / 32]->barrier.arrive_and_wait(); }
inline long long __shfl_sync(unsigned, long long x, int from) {
    Warp& warp = *warps[threadIdx.x / 32];
    warp.whole[threadIdx.x % 32] = x;
    warp.barrier.arrive_and_wait();
    const long long y = warp.whole[from];
    warp.barrier.arrive_and_wait();
    return y;
}
inline float __shfl_xor_sync(unsigned, float x, int offset) {
    Warp& warp = *warps[threadIdx.x / 32];
    const int lane = threadIdx.x % 32;
    warp.value[lane] = x;
    warp.barrier.arrive_and_wait();
    const float y = warp.value[lane ^ offset];
    warp.barrier.arrive_and_wait();
    return y;
}

// mma.m16n8k16, by the fragments' layout in the PTX manual ('Matrix Fragments for mma.m16n8k16').
template <typename T, typename ToFloat>
void host_mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, ToFloat to_float) {
    Warp& warp = *warps[threadIdx.x / 32];
    const int lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    std::memcpy(warp.a[lane], a, 16);
    warp.b[lane][0] = b0, warp.b[lane][1] = b1;
    warp.barrier.arrive_and_wait();
    const auto element = [&](unsigned pair, int which) {
        T x;
        const auto bits = static_cast<uint16_t>(pair >> 16 * which);
        std::memcpy(&x, &bits, 2);
        return to_float(x);
    };
    for (int i = 0; i < 4; ++i) {
        const int row = group + i / 2 * 8, column = 2 * quad + i % 2;
        for (int k = 0; k < 16; ++k) {
            const int owner = k % 8 / 2, half = k / 8;
            c[i] += element(warp.a[row % 8 * 4 + owner][row / 8 + 2 * half], k % 2) *
                    element(warp.b[column * 4 + owner][half], k % 2);
        }
    }
    warp.barrier.arrive_and_wait();
}

template <typename Kernel>
void launch(unsigned blocks, unsigned threads, Kernel kernel) {
    gridDim.x = blocks, blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        block_barrier = std::make_unique<std::barrier<>>(threads);
        warps.clear();
        for (unsigned i = 0; i < threads / 32; ++i) warps.push_back(std::make_unique<Warp>());
        std::vector<std::thread> running;
        for (unsigned i = 0; i < threads; ++i) running.emplace_back([=] { threadIdx.x = i, kernel(); });
        for (auto& thread : running) thread.join();
    }
}
