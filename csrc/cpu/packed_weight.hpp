// A weight matrix as the kernels want it, and the products with it.
#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "cpu/kernels.hpp"

namespace minisgl::cpu {

// The kernels in use: at first the best that this processor can run.
const Kernels& kernels();
// Names of those that it can run, best first.
std::vector<std::string_view> available_kernels();
// Throws std::invalid_argument if `name` isn't among them.
void select_kernels(std::string_view name);

// The format called `name` (as GGUF calls it, in lower case); throws std::invalid_argument if there is none.
Format format_of(std::string_view name);

// A matrix [rows, columns] that is put together from parts, each in its own format: weights merged from several
// tensors.
class PackedWeight {
  public:
    explicit PackedWeight(int columns);

    int padded_columns() const { return padded(columns_, kBlock); }
    std::size_t num_bytes() const { return num_bytes_; }

    // Rows [first, first + rows), once each. `source` has them as a checkpoint does, one after another: plain values,
    // or GGUF's blocks of 32 columns. Throws std::invalid_argument if they aren't `num_bytes`, or if blocks don't
    // divide the columns.
    void put(Format format, const std::byte* source, std::size_t num_bytes, int first, int rows);

    // out[m, rows] = x[m, columns] · Wᵀ (+ bias). Rows of x must be readable, and finite, up to padded_columns().
    void multiply(Rows x, int m, const float* bias, float* out, std::ptrdiff_t out_stride) const;

    // out[i, columns] = W[ids[i]] in f32; ids must be in range.
    void gather(const std::int32_t* ids, int count, float* out, std::ptrdiff_t out_stride) const;

  private:
    struct Part {  // a panel, and the rows of the matrix that it holds
        Panel panel;
        int first, count;
    };

    int columns_;
    std::size_t num_bytes_ = 0;
    std::vector<Part> parts_;  // by row
    std::vector<std::shared_ptr<std::byte>> memory_;
};

}  // namespace minisgl::cpu
