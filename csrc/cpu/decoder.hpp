// A dense decoder's step, from token ids to final hidden states, in one call over packed weights.
#pragma once

#include <vector>

#include "cpu/packed_weight.hpp"

namespace minisgl::cpu {

struct Shape {
    int hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim;
    float norm_eps;
};

// One layer's weights; a bias or head norm that the model hasn't is null. Nothing here is owned.
struct Layer {
    const float *input_norm, *post_norm;  // [hidden_size]
    const float* head_norm;               // [num_heads + num_kv_heads, head_dim]
    const PackedWeight *qkv, *o, *gate_up, *down;
    const float *qkv_bias, *o_bias, *gate_up_bias, *down_bias;
    int window;
};

// The arrays of a minisgl.attention.base.ForwardBatch, and where the results go.
struct Step {
    int num_tokens, num_outputs;
    const std::int32_t* input_ids;
    const float *cos, *sin;                      // [T, head_dim], the first half of sin negated
    const std::int64_t *slots, *output_indices;  // [T], [R]
    Paging paging;
    float *keys, *values;         // the pool's [layers, pages, page_size, num_kv_heads, head_dim]
    std::ptrdiff_t layer_stride;  // floats
    float* hidden;                // [R, hidden_size]
    std::int64_t* marks;          // null, or [9 layers + 3]: where to note when each operator ends
};

// Splits a step's attention into parts of similar work.
std::vector<AttentionPart> plan_attention(const Paging& paging, int num_heads, int num_kv_heads);

// Attention of all of `parts` on all threads.
void attend(const Attention& attention, const std::vector<AttentionPart>& parts);

class Decoder {
  public:
    Decoder(const Shape& shape, const PackedWeight* embedding, const float* norm);

    void add(const Layer& layer) { layers_.push_back(layer); }

    void forward(const Step& step);

  private:
    void reserve(int num_tokens);
    void mark();
    void norm(const float* delta, const float* weight, int num_tokens);
    void rotate_and_store(const Layer& layer, const Step& step, float* keys, float* values);
    void self_attention(const Layer& layer, const Step& step, std::size_t number);
    void mlp(const Layer& layer, int num_tokens);
    void outputs(const Step& step);

    Shape shape_;
    const PackedWeight* embedding_;
    const float* norm_;
    std::vector<Layer> layers_;
    std::vector<AttentionPart> parts_;  // of the step under way
    std::int64_t* marks_ = nullptr;     // what is left of its marks

    // Activations, by token. Rows are padded with zeros to whole blocks where they are the input of a product.
    int hidden_stride_, attended_stride_, qkv_size_;
    std::vector<float> residual_, normed_, delta_, qkv_, attended_, inner_;
};

}  // namespace minisgl::cpu
