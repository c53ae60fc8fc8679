#include "cpu/sample.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/thread_pool.hpp"

namespace minisgl::cpu {
namespace {

constexpr int kPart = 8192;  // tokens that one thread takes at a time

struct Best {
    float value = -std::numeric_limits<float>::infinity();
    int token = 0;
};

// Philox4x32-10; see minisgl/kernels/sample/noise.py.
std::array<std::uint32_t, 4> philox(std::uint64_t seed, std::uint32_t block, std::uint32_t index) {
    std::array<std::uint32_t, 4> x{block, index, 0, 0};
    auto k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t a = std::uint64_t{0xD2511F53} * x[0], b = std::uint64_t{0xCD9E8D57} * x[2];
        x = {static_cast<std::uint32_t>(b >> 32) ^ x[1] ^ k0, static_cast<std::uint32_t>(b),
             static_cast<std::uint32_t>(a >> 32) ^ x[3] ^ k1, static_cast<std::uint32_t>(a)};
        k0 += 0x9E3779B9, k1 += 0xBB67AE85;
    }
    return x;
}

float gumbel(std::uint32_t bits) {
    const float u = std::min((static_cast<float>(bits) + 0.5f) * 0x1p-32f, 1 - 0x1p-24f);
    return -std::log(-std::log1p(-u));
}

Best most_likely(const float* logits, int first, int last) {
    Best best;
    for (int i = first; i < last; ++i)
        if (logits[i] > best.value) best = {logits[i], i};
    return best;
}

// `block` is the noise's at i = 0. Noise is at most -log(u), which the leading zeros of its bits bound: few tokens need
// its logarithms.
Best draw(const float* logits, float temperature, std::uint64_t seed, std::uint32_t index, std::uint32_t block,
          int first, int last) {
    Best best;
    for (int i = first; i < last; i += 4) {
        const auto bits = philox(seed, block + static_cast<std::uint32_t>(i / 4), index);
        for (int k = 0; k < std::min(4, last - i); ++k) {
            const float value = logits[i + k] / temperature;
            if (value + 0.694f * static_cast<float>(std::countl_zero(bits[k]) + 1) < best.value) continue;
            const float noisy = value + gumbel(bits[k]);
            if (noisy > best.value) best = {noisy, i + k};
        }
    }
    return best;
}

}  // namespace

void sample(const Sampling& s) {
    const int num_parts = (s.vocab_size + kPart - 1) / kPart;
    std::vector<Best> parts(static_cast<std::size_t>(s.num_rows) * num_parts);
    ThreadPool::instance().run(s.num_rows * num_parts, [&](int i) {
        const int row = i / num_parts, first = i % num_parts * kPart, last = std::min(first + kPart, s.vocab_size);
        const float *logits = s.logits + row * s.stride, temperature = s.temperature[row];
        parts[i] = temperature == 0 ? most_likely(logits, first, last)
                                    : draw(logits, temperature, static_cast<std::uint64_t>(s.seeds[row]),
                                           static_cast<std::uint32_t>(s.output_index[row]), s.first / 4, first, last);
    });
    for (int row = 0; row < s.num_rows; ++row) {
        const auto from = parts.begin() + row * num_parts;
        const Best best = *std::max_element(from, from + num_parts, [](Best a, Best b) { return a.value < b.value; });
        s.out[row] = s.first + best.token;
        if (s.best != nullptr) s.best[row] = best.value;
    }
}

}  // namespace minisgl::cpu
