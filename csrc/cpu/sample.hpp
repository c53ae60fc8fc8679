// From logits to tokens.
#pragma once

#include <cstddef>
#include <cstdint>

namespace minisgl::cpu {

// As minisgl.kernels.sample.op.sample_tokens, for R rows of float32 logits.
struct Sampling {
    const float* logits;  // [R, vocab_size]
    std::ptrdiff_t stride;
    int num_rows, vocab_size;
    const float* temperature;  // [R]; 0: the most likely token
    const std::int64_t* seeds;
    const std::int32_t* output_index;
    int first;  // id of the first logit, a multiple of 4
    std::int64_t* out;
    float* best;  // [R], what each token was chosen by; or null
};

void sample(const Sampling& s);

}  // namespace minisgl::cpu
