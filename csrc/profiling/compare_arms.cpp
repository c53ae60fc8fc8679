#include "profiling/compare_arms.hpp"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

#include "radix/compare.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace minisgl::profiling {
namespace {

using Ids = std::span<const std::int32_t>;
using Compare = std::size_t (*)(Ids, Ids);

[[gnu::noinline]] std::size_t blockwise(Ids a, Ids b) { return common_prefix(a, b); }

[[gnu::noinline]] std::size_t mismatch(Ids a, Ids b) {
    return static_cast<std::size_t>(std::mismatch(a.begin(), a.end(), b.begin()).first - a.begin());
}

#if defined(__x86_64__)
[[gnu::target("avx2")]] inline __m256i equal(Ids a, Ids b, std::size_t at) {
    const auto* x = reinterpret_cast<const __m256i*>(a.data() + at);
    const auto* y = reinterpret_cast<const __m256i*>(b.data() + at);
    return _mm256_cmpeq_epi32(_mm256_loadu_si256(x), _mm256_loadu_si256(y));
}

// Four vectors of eight ids a turn; the mask of the first vector that differs says where.
[[gnu::noinline, gnu::target("avx2")]] std::size_t avx2(Ids a, Ids b) {
    std::size_t i = 0;
    for (; i + 32 <= a.size(); i += 32) {
        const __m256i low = _mm256_and_si256(equal(a, b, i), equal(a, b, i + 8));
        const __m256i high = _mm256_and_si256(equal(a, b, i + 16), equal(a, b, i + 24));
        if (_mm256_movemask_epi8(_mm256_and_si256(low, high)) != -1) break;
    }
    for (; i + 8 <= a.size(); i += 8) {
        const auto mask = static_cast<unsigned>(_mm256_movemask_epi8(equal(a, b, i)));
        if (mask != ~0U) return i + static_cast<std::size_t>(std::countr_one(mask)) / 4;
    }
    while (i < a.size() && a[i] == b[i]) ++i;
    return i;
}
#endif

Compare arm_called(std::string_view name) {
    if (name == "blockwise") return blockwise;
    if (name == "mismatch") return mismatch;
#if defined(__x86_64__)
    if (name == "avx2" && __builtin_cpu_supports("avx2")) return avx2;
#endif
    throw std::invalid_argument("this processor has no way of comparing called " + std::string(name));
}

}  // namespace

std::size_t compare_by(std::string_view arm, Ids a, Ids b) {
    const std::size_t size = std::min(a.size(), b.size());
    return arm_called(arm)(a.first(size), b.first(size));
}

double compare_ns(std::string_view arm, std::size_t size, std::size_t calls) {
    using Clock = std::chrono::steady_clock;
    const Compare compare = arm_called(arm);
    std::vector<std::int32_t> a(size);
    for (std::size_t i = 0; i < size; ++i) a[i] = static_cast<std::int32_t>(i * 7);
    const std::vector<std::int32_t> b = a;
    volatile std::size_t sink = compare(a, b);
    const auto start = Clock::now();
    for (std::size_t call = 0; call < calls; ++call) sink = sink + compare(a, b);
    return std::chrono::duration<double, std::nano>(Clock::now() - start).count() / static_cast<double>(calls);
}

}  // namespace minisgl::profiling
