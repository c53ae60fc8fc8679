// Ways of comparing prefixes, side by side, for the laboratory (minisgl/profiling/experiments.py): the one that the
// tree uses, std::mismatch, and vector instructions by hand.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace minisgl::profiling {

// The number of leading elements that are equal, by the arm `blockwise`, `mismatch` or `avx2`. Throws
// std::invalid_argument for another name, and where the processor lacks the instructions.
std::size_t compare_by(std::string_view arm, std::span<const std::int32_t> a, std::span<const std::int32_t> b);

// Nanoseconds a call, the mean of `calls` over two arrays of `size` equal ids.
double compare_ns(std::string_view arm, std::size_t size, std::size_t calls);

}  // namespace minisgl::profiling
