// What the CPU kernels compute, and the table through which they are called.
//
// kernels.inl is compiled once an instruction set (kernels_*.cpp); `kernels()` chooses at run time. Functions that
// those files share must be static: each file would bring a copy for its own instruction set, and the linker keeps but
// one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace minisgl::cpu {

constexpr int kPanel = 32;  // output rows of a weight that lie side by side
constexpr int kBlock = 32;  // input columns in one block of a panel
constexpr int kTile = 64;   // KV tokens that attention takes at once

// How weights are kept. The quantised ones are GGUF's: 32 columns share a half-precision scale (q4_1: and a minimum).
enum class Format { f32, f16, bf16, q8_0, q4_0, q4_1 };

static constexpr std::size_t block_bytes(Format format) {
    constexpr std::size_t of_a_row[] = {4 * kBlock, 2 * kBlock, 2 * kBlock, 2 + kBlock, 2 + kBlock / 2, 4 + kBlock / 2};
    return of_a_row[static_cast<int>(format)] * kPanel;
}

// A panel: kPanel output rows over all input columns, block after block. In a block of
//   f32, f16, bf16: values [column][row]
//   q8_0:           scales [row], then int8 [column][row]
//   q4_0, q4_1:     scales [row], (q4_1) minima [row], then 32-bit words [column / 8][row] of eight columns, lowest
//   first
struct Panel {
    Format format;
    const std::byte* data;
    int num_blocks;
};

struct Rows {
    const float* data;
    std::ptrdiff_t stride;  // floats from a row to the next
};

// Where the sequences of a step lie; see minisgl.attention.base.ForwardBatch.
struct Paging {
    const std::int32_t *page_table, *seq_lens, *query_starts;
    int num_sequences, table_stride, page_size;
};

// One layer's attention over the paged pool.
struct Attention {
    Rows q;      // [T, heads × head_dim]
    float* out;  // [T, heads × head_dim]
    std::ptrdiff_t out_stride;
    const float *keys, *values;  // [pages, page_size, kv_heads, head_dim]
    Paging paging;
    int num_heads, num_kv_heads, head_dim;
    float scale;
    int window;  // a query sees so many tokens, itself the last; 0: all
};

// Queries [first, first + count) of the step, all of sequence `sequence`, and the heads that share one KV head.
struct AttentionPart {
    int sequence, kv_head, first, count;
};

struct Kernels {
    const char* name;
    // out[m, num_columns] = x[m, 32 × num_blocks] · panelᵀ (+ bias); `scratch`: kScratchBlocks blocks of f32, then m
    // rows of a panel.
    void (*multiply)(Panel panel, Rows x, int m, const float* bias, float* out, std::ptrdiff_t out_stride,
                     int num_columns, float* scratch);
    // out[column][row] of the block, in f32.
    void (*expand)(Format format, const std::byte* block, float* out);
    // out[size] = x · weight / rms(x); `residual`, if there is one, first becomes residual + x and is what is normed.
    void (*rms_norm)(const float* x, float* residual, const float* weight, float eps, int size, float* out);
    // In place: element i of a head is turned with i + size / 2. `sin` has its first half negated.
    void (*rotate)(float* head, const float* cos, const float* sin, int size);
    // out[i] = silu(gate[i]) · up[i]
    void (*silu_mul)(const float* gate, const float* up, int size, float* out);
    void (*attend)(const Attention& a, const AttentionPart& part, float* scratch);
};

constexpr int kScratchBlocks = 6;

static constexpr int padded(int size, int multiple) { return (size + multiple - 1) / multiple * multiple; }

// Floats of scratch that `attend` needs for `rows` = count × heads that share a KV head.
static constexpr std::size_t attention_scratch(std::size_t rows, std::size_t head_dim) {
    const std::size_t width = (head_dim + 15) / 16 * 16;
    return rows * (2 * width + kTile + 2) + 2 * kTile * width;
}

}  // namespace minisgl::cpu
