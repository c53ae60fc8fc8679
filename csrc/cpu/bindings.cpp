#include "cpu/bindings.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>

#include "cpu/decoder.hpp"
#include "cpu/sample.hpp"
#include "cpu/thread_pool.hpp"

namespace nb = nanobind;

namespace minisgl::cpu {
namespace {

using Address = std::uintptr_t;
using Pages = std::tuple<Address, Address, Address, int, int, int>;
using Unlocked = nb::call_guard<nb::gil_scoped_release>;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

Paging paging(const Pages& pages) {
    const auto& [page_table, seq_lens, query_starts, num_sequences, table_stride, page_size] = pages;
    return {at<const std::int32_t>(page_table),
            at<const std::int32_t>(seq_lens),
            at<const std::int32_t>(query_starts),
            num_sequences,
            table_stride,
            page_size};
}

void put(PackedWeight& self, std::string_view format, Address source, std::size_t num_bytes, int first, int rows) {
    self.put(format_of(format), at<std::byte>(source), num_bytes, first, rows);
}

void multiply(const PackedWeight& self, Address x, std::ptrdiff_t stride, int m, Address bias, Address out,
              std::ptrdiff_t out_stride) {
    self.multiply({at<const float>(x), stride}, m, at<const float>(bias), at<float>(out), out_stride);
}

void gather(const PackedWeight& self, Address ids, int count, Address out, std::ptrdiff_t out_stride) {
    self.gather(at<const std::int32_t>(ids), count, at<float>(out), out_stride);
}

void init_decoder(Decoder* self, std::tuple<int, int, int, int, int> sizes, float norm_eps,
                  const PackedWeight& embedding, Address norm) {
    const auto [hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim] = sizes;
    const Shape shape{hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, norm_eps};
    new (self) Decoder(shape, &embedding, at<const float>(norm));
}

void add_layer(Decoder& self, std::tuple<Address, Address, Address> norms, const PackedWeight& qkv,
               const PackedWeight& o, const PackedWeight& gate_up, const PackedWeight& down,
               std::tuple<Address, Address, Address, Address> biases, int window) {
    const auto [input_norm, post_norm, head_norm] = norms;
    const auto [qkv_bias, o_bias, gate_up_bias, down_bias] = biases;
    self.add({at<const float>(input_norm), at<const float>(post_norm), at<const float>(head_norm), &qkv, &o, &gate_up,
              &down, at<const float>(qkv_bias), at<const float>(o_bias), at<const float>(gate_up_bias),
              at<const float>(down_bias), window});
}

void forward(Decoder& self, int num_tokens, int num_outputs, Address input_ids, Address cos, Address sin, Address slots,
             Address output_indices, const Pages& pages, Address keys, Address values, std::ptrdiff_t layer_stride,
             Address hidden, Address marks) {
    self.forward({num_tokens, num_outputs, at<const std::int32_t>(input_ids), at<const float>(cos),
                  at<const float>(sin), at<const std::int64_t>(slots), at<const std::int64_t>(output_indices),
                  paging(pages), at<float>(keys), at<float>(values), layer_stride, at<float>(hidden),
                  at<std::int64_t>(marks)});
}

void paged_attention(Address q, std::ptrdiff_t q_stride, Address out, Address keys, Address values, const Pages& pages,
                     int num_heads, int num_kv_heads, int head_dim, float scale, int window) {
    const Attention attention{{at<const float>(q), q_stride},
                              at<float>(out),
                              static_cast<std::ptrdiff_t>(num_heads) * head_dim,
                              at<const float>(keys),
                              at<const float>(values),
                              paging(pages),
                              num_heads,
                              num_kv_heads,
                              head_dim,
                              scale,
                              window};
    attend(attention, plan_attention(attention.paging, num_heads, num_kv_heads));
}

void sample_tokens(Address logits, std::ptrdiff_t stride, int num_rows, int vocab_size, Address temperature,
                   Address seeds, Address output_index, int first, Address out, Address best) {
    sample({at<const float>(logits), stride, num_rows, vocab_size, at<const float>(temperature),
            at<const std::int64_t>(seeds), at<const std::int32_t>(output_index), first, at<std::int64_t>(out),
            at<float>(best)});
}

std::vector<std::string> available() {
    const std::vector<std::string_view> names = available_kernels();
    return {names.begin(), names.end()};
}

}  // namespace

void bind(nb::module_& module) {
    nb::class_<PackedWeight>(module, "PackedWeight")
        .def(nb::init<int>())
        .def_prop_ro("padded_columns", &PackedWeight::padded_columns)
        .def_prop_ro("num_bytes", &PackedWeight::num_bytes)
        .def("put", &put, Unlocked())
        .def("multiply", &multiply, Unlocked())
        .def("gather", &gather, Unlocked());
    nb::class_<Decoder>(module, "Decoder")
        .def("__init__", &init_decoder, nb::keep_alive<1, 4>())
        .def("add_layer", &add_layer, nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(),
             nb::keep_alive<1, 6>())
        .def("forward", &forward, Unlocked());
    module.def("cpu_paged_attention", &paged_attention, Unlocked());
    module.def("cpu_sample", &sample_tokens, Unlocked());
    module.def("cpu_threads", [] { return ThreadPool::instance().size(); });
    module.def("cpu_set_threads", [](int count) { ThreadPool::instance().resize(count); });
    module.def("cpu_kernels", [] { return std::string(kernels().name); });
    module.def("cpu_available_kernels", &available);
    module.def("cpu_select_kernels", &select_kernels);
}

}  // namespace minisgl::cpu
