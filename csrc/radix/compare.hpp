// How far two sequences of token ids agree: the inner loop of the prefix tree.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace minisgl {

// The number of leading elements of `a` and `b` that are equal.
//
// Whole blocks are compared without a branch inside, which compilers turn into vector instructions; only the block
// that differs is searched element by element. std::mismatch leaves after each element and so stays scalar.
// 1024 equal ids (g++ 12 -O3, baseline x86-64, Sapphire Rapids): 58 ns, in blocks of 32 75 ns, std::mismatch 300 ns.
inline std::size_t common_prefix(std::span<const std::int32_t> a, std::span<const std::int32_t> b) {
    constexpr std::size_t kBlock = 64;
    const std::size_t size = a.size() < b.size() ? a.size() : b.size();
    const std::int32_t* x = a.data();
    const std::int32_t* y = b.data();
    std::size_t i = 0;
    for (; i + kBlock <= size; i += kBlock) {
        std::int32_t difference = 0;
        for (std::size_t k = 0; k < kBlock; ++k) difference |= x[i + k] ^ y[i + k];
        if (difference != 0) break;
    }
    while (i < size && x[i] == y[i]) ++i;
    return i;
}

}  // namespace minisgl
