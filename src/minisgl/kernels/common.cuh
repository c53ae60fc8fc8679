// What the CUDA kernels share: dependent launch, vector loads and stores, warp-wide copies, sums over a row.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

using int64 = long long;
using uint64 = unsigned long long;
constexpr int kWarp = 32;

constexpr __device__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Programmatic dependent launch. Every kernel calls wait() on every path before it touches what earlier kernels write
// or read, and trigger() once, which lets the next kernel on the stream start as soon as all blocks got there. Both do
// nothing unless the launch asked for it. Constants (weights, tables) may be read before wait().
//
// Where to trigger is a trade. Before wait(), the next kernel's launch and its loads of constants overlap most; but
// its blocks trigger too, so that several later kernels pile up on the multiprocessors, unevenly, and slow down this
// one (measured: add_rmsnorm of 256 rows 2.3 µs instead of 1.3). Behind wait() only one kernel waits. So: before it
// where constants are loaded and blocks are few, else behind.
namespace pdl {
__device__ inline void trigger() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ inline void wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
}  // namespace pdl

template <int kBytes>
struct VecOf;
template <>
struct VecOf<16> {
    using type = uint4;
};
template <>
struct VecOf<8> {
    using type = uint2;
};
template <>
struct VecOf<4> {
    using type = unsigned;
};
template <>
struct VecOf<2> {
    using type = unsigned short;
};
template <>
struct VecOf<1> {
    using type = unsigned char;
};
template <int kBytes>
using Vec = typename VecOf<kBytes>::type;  // what one instruction moves

// Constants go through the read-only path. Activations must not: under dependent launch their writer may still run
// when the kernel starts, so they are read at L2, where every multiprocessor sees the same.
template <typename V>
__device__ inline V load_const(const V* p) {
    return __ldg(p);
}
template <typename V>
__device__ inline V load(const V* p) {
    return __ldcg(p);
}

// Brings an address into L2. Allowed before pdl::wait() even for activations: nothing is read, and a later write of
// theirs meets the line in L2, where every multiprocessor sees it.
__device__ inline void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// N values of T that move as one vector.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
    T v[N];
    using V = Vec<sizeof(T) * N>;
    __device__ static Pack load(const T* p) { return from(::load(reinterpret_cast<const V*>(p))); }
    __device__ static Pack load_const(const T* p) { return from(::load_const(reinterpret_cast<const V*>(p))); }
    __device__ void store(T* p) const { *reinterpret_cast<V*>(p) = reinterpret_cast<const V&>(*this); }
    __device__ static Pack from(V raw) { return reinterpret_cast<Pack&>(raw); }
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
    return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
    return __float2half_rn(x);
}

namespace warp {

// Sum over groups of kLanes neighbouring lanes (a power of two); every lane of the warp must take part.
template <int kLanes>
__device__ inline float sum(float x) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
    return x;
}

// kCount vectors of a lane, every kLanes-th of a row from `first` on; those at `end` and beyond don't exist.
template <int kVec, int kLanes, int kCount>
struct Piece {
    Vec<kVec> v[kCount];

    template <bool kConst>
    __device__ void load(const void* row, int first, int end) {
        const auto* p = static_cast<const Vec<kVec>*>(row);
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
            const int i = first + j * kLanes;
            if (i < end) v[j] = kConst ? ::load_const(p + i) : ::load(p + i);
        }
    }
    __device__ void store(void* row, int first, int end) const {
        auto* p = static_cast<Vec<kVec>*>(row);
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
            const int i = first + j * kLanes;
            if (i < end) p[i] = v[j];
        }
    }
};

// Copies kBytes with kLanes lanes: up to eight loads of a lane are in flight before its first store.
template <int kBytes, int kVec, int kLanes, bool kConst>
__device__ void copy(void* dst, const void* src, int lane) {
    constexpr int kVecs = kBytes / kVec, kPerLane = ceil_div(kVecs, kLanes), kCount = kPerLane < 8 ? kPerLane : 8;
    for (int first = lane; first < kVecs; first += kLanes * kCount) {
        Piece<kVec, kLanes, kCount> piece;
        piece.template load<kConst>(src, first, kVecs);
        piece.store(dst, first, kVecs);
    }
}

}  // namespace warp
