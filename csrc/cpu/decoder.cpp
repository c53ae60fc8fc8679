#include "cpu/decoder.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "cpu/thread_pool.hpp"

namespace minisgl::cpu {
namespace {

constexpr int kGrain = 8;           // tokens that one thread takes at least where the work of each is small
constexpr int kAttentionRows = 48;  // queries × heads of a part, about: enough to make use of a tile of keys

// body(token) for every token, on several threads where there are many.
template <class Body>
void for_tokens(int count, Body&& body) {
    ThreadPool::instance().run((count + kGrain - 1) / kGrain, [&](int chunk) {
        for (int t = chunk * kGrain; t < std::min(count, (chunk + 1) * kGrain); ++t) body(t);
    });
}

}  // namespace

std::vector<AttentionPart> plan_attention(const Paging& paging, int num_heads, int num_kv_heads) {
    std::vector<AttentionPart> parts;
    const int most = std::max(1, kAttentionRows * num_kv_heads / num_heads);
    for (int s = 0; s < paging.num_sequences; ++s)
        // the last queries see most: longest work first
        for (int end = paging.query_starts[s + 1], first; end > paging.query_starts[s]; end = first) {
            first = std::max(paging.query_starts[s], end - most);
            for (int h = 0; h < num_kv_heads; ++h) parts.push_back({s, h, first, end - first});
        }
    return parts;
}

void attend(const Attention& attention, const std::vector<AttentionPart>& parts) {
    ThreadPool::instance().run(static_cast<int>(parts.size()), [&](int i) {
        const std::size_t rows =
            static_cast<std::size_t>(parts[i].count) * (attention.num_heads / attention.num_kv_heads);
        kernels().attend(attention, parts[i], thread_scratch(attention_scratch(rows, attention.head_dim)));
    });
}

Decoder::Decoder(const Shape& shape, const PackedWeight* embedding, const float* norm)
    : shape_(shape),
      embedding_(embedding),
      norm_(norm),
      hidden_stride_(padded(shape.hidden_size, kBlock)),
      attended_stride_(padded(shape.num_heads * shape.head_dim, kBlock)),
      qkv_size_((shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim) {}

void Decoder::reserve(int num_tokens) {
    const auto grow = [num_tokens](std::vector<float>& buffer, std::size_t stride) {
        const std::size_t size = num_tokens * stride + kBlock;  // a product may read a block's worth past a row's end
        if (buffer.size() < size) buffer.assign(size, 0);
    };
    grow(residual_, hidden_stride_);
    grow(normed_, hidden_stride_);
    grow(delta_, hidden_stride_);
    grow(qkv_, qkv_size_);
    grow(attended_, attended_stride_);
    grow(inner_, 2 * shape_.intermediate_size);
}

// Nanoseconds of the monotonic clock, which is Python's time.perf_counter_ns as well.
void Decoder::mark() {
    if (marks_ != nullptr)
        *marks_++ = std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void Decoder::forward(const Step& step) {
    marks_ = step.marks;
    mark();
    reserve(step.num_tokens);
    parts_ = plan_attention(step.paging, shape_.num_heads, shape_.num_kv_heads);
    embedding_->gather(step.input_ids, step.num_tokens, residual_.data(), hidden_stride_);
    mark();
    for (std::size_t i = 0; i < layers_.size(); ++i) {
        norm(i > 0 ? delta_.data() : nullptr, layers_[i].input_norm, step.num_tokens);
        mark();
        self_attention(layers_[i], step, i);
        norm(delta_.data(), layers_[i].post_norm, step.num_tokens);
        mark();
        mlp(layers_[i], step.num_tokens);
    }
    outputs(step);
    mark();
}

// normed = rms_norm(residual += delta)
void Decoder::norm(const float* delta, const float* weight, int num_tokens) {
    for_tokens(num_tokens, [&](int t) {
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(t) * hidden_stride_;
        const float* x = delta != nullptr ? delta + at : residual_.data() + at;
        kernels().rms_norm(x, delta != nullptr ? residual_.data() + at : nullptr, weight, shape_.norm_eps,
                           shape_.hidden_size, normed_.data() + at);
    });
}

void Decoder::self_attention(const Layer& layer, const Step& step, std::size_t number) {
    layer.qkv->multiply({normed_.data(), hidden_stride_}, step.num_tokens, layer.qkv_bias, qkv_.data(), qkv_size_);
    mark();
    float *keys = step.keys + number * step.layer_stride, *values = step.values + number * step.layer_stride;
    rotate_and_store(layer, step, keys, values);
    mark();
    const float scale = 1 / __builtin_sqrtf(static_cast<float>(shape_.head_dim));
    attend({{qkv_.data(), qkv_size_},
            attended_.data(),
            attended_stride_,
            keys,
            values,
            step.paging,
            shape_.num_heads,
            shape_.num_kv_heads,
            shape_.head_dim,
            scale,
            layer.window},
           parts_);
    mark();
    layer.o->multiply({attended_.data(), attended_stride_}, step.num_tokens, layer.o_bias, delta_.data(),
                      hidden_stride_);
    mark();
}

// Norms (where the model does) and rotates each query and key head in place; keys and values go to their slots.
void Decoder::rotate_and_store(const Layer& layer, const Step& step, float* keys, float* values) {
    const int dim = shape_.head_dim, num_qk = shape_.num_heads + shape_.num_kv_heads;
    const std::ptrdiff_t kv_size = static_cast<std::ptrdiff_t>(shape_.num_kv_heads) * dim;
    for_tokens(step.num_tokens, [&](int t) {
        float* heads = qkv_.data() + static_cast<std::ptrdiff_t>(t) * qkv_size_;
        for (int h = 0; h < num_qk; ++h) {
            float* head = heads + h * dim;
            if (layer.head_norm != nullptr)
                kernels().rms_norm(head, nullptr, layer.head_norm + h * dim, shape_.norm_eps, dim, head);
            kernels().rotate(head, step.cos + t * dim, step.sin + t * dim, dim);
        }
        const float* k = heads + shape_.num_heads * dim;
        std::memcpy(keys + step.slots[t] * kv_size, k, kv_size * sizeof(float));
        std::memcpy(values + step.slots[t] * kv_size, k + kv_size, kv_size * sizeof(float));
    });
}

void Decoder::mlp(const Layer& layer, int num_tokens) {
    const int size = shape_.intermediate_size, stride = 2 * size;
    layer.gate_up->multiply({normed_.data(), hidden_stride_}, num_tokens, layer.gate_up_bias, inner_.data(), stride);
    mark();
    for_tokens(num_tokens, [&](int t) {
        float* gate = inner_.data() + static_cast<std::ptrdiff_t>(t) * stride;
        kernels().silu_mul(gate, gate + size, size, gate);
    });
    mark();
    layer.down->multiply({inner_.data(), stride}, num_tokens, layer.down_bias, delta_.data(), hidden_stride_);
    mark();
}

void Decoder::outputs(const Step& step) {
    for_tokens(step.num_outputs, [&](int r) {
        const std::ptrdiff_t at = step.output_indices[r] * hidden_stride_;
        float* out = step.hidden + static_cast<std::ptrdiff_t>(r) * shape_.hidden_size;
        std::memcpy(out, residual_.data() + at, shape_.hidden_size * sizeof(float));  // a token may be asked for twice
        kernels().rms_norm(delta_.data() + at, out, norm_, shape_.norm_eps, shape_.hidden_size, out);
    });
}

}  // namespace minisgl::cpu
