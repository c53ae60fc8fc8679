// Prefix comparison inside C++: std::mismatch beside the blockwise compare that the tree uses and the memcmp of libc,
// which bounds both. Prints one JSON object a line: ids compared, then nanoseconds a call (median, p10, p90).
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../csrc/radix/compare.hpp"

using Ids = std::span<const std::int32_t>;

[[gnu::noinline]] std::size_t mismatch(Ids a, Ids b) {
    return static_cast<std::size_t>(std::mismatch(a.begin(), a.end(), b.begin()).first - a.begin());
}

[[gnu::noinline]] std::size_t blockwise(Ids a, Ids b) { return minisgl::common_prefix(a, b); }

[[gnu::noinline]] std::size_t libc(Ids a, Ids b) {
    return std::memcmp(a.data(), b.data(), a.size_bytes()) == 0 ? a.size() : 0;
}

static void measure(const char* name, std::size_t (*compare)(Ids, Ids), std::size_t size) {
    using Clock = std::chrono::steady_clock;
    constexpr int kSamples = 201, kCalls = 1000;
    std::vector<std::int32_t> a(size);
    for (std::size_t i = 0; i < size; ++i) a[i] = static_cast<std::int32_t>(i * 7);
    const std::vector<std::int32_t> b = a;
    std::vector<double> times;
    volatile std::size_t sink = 0;
    for (int sample = 0; sample < kSamples; ++sample) {
        const auto start = Clock::now();
        for (int call = 0; call < kCalls; ++call) sink = sink + compare(a, b);
        times.push_back(std::chrono::duration<double, std::nano>(Clock::now() - start).count() / kCalls);
    }
    std::sort(times.begin(), times.end());
    std::printf("{\"compare\": \"%s\", \"ids\": %zu, \"median_ns\": %.1f, \"p10_ns\": %.1f, \"p90_ns\": %.1f}\n", name,
                size, times[kSamples / 2], times[kSamples / 10], times[kSamples * 9 / 10]);
}

int main() {
    for (const std::size_t size : {16, 384, 1024, 4096}) {
        measure("memcmp", libc, size);
        measure("std::mismatch", mismatch, size);
        measure("blockwise", blockwise, size);
    }
}
