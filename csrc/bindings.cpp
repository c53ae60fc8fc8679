// The Python module minisgl._C. Its types are in src/minisgl/_C.pyi.
#include "cpu/bindings.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string_view.h>

#include <algorithm>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "profiling/compare_arms.hpp"
#include "radix/compare.hpp"
#include "radix/radix_tree.hpp"

namespace nb = nanobind;
using minisgl::RadixTree;

namespace {

// A contiguous one-dimensional buffer of 32-bit integers, borrowed from a Python object without a copy.
//
// This speaks to the buffer protocol itself: 30 ns a call with array('i'), 60 ns with NumPy, where nb::ndarray takes
// 90 and 110 ns. On the way out, an array made by numpy.empty takes 170 ns where nb::ndarray takes 300.
class Int32View {
  public:
    Int32View(nb::handle object, const char* name, int flags = PyBUF_SIMPLE) {
        const bool exported = PyObject_GetBuffer(object.ptr(), &view_, flags | PyBUF_ND | PyBUF_FORMAT) == 0;
        if (exported && view_.ndim == 1 && view_.itemsize == 4 && (is_format("i") || is_format("l"))) return;
        if (exported) PyBuffer_Release(&view_);
        PyErr_Clear();
        const std::string text = " must be array('i') or a contiguous one-dimensional array of np.int32";
        throw nb::type_error((name + text).c_str());
    }
    ~Int32View() { PyBuffer_Release(&view_); }
    Int32View(const Int32View&) = delete;
    Int32View& operator=(const Int32View&) = delete;

    std::span<std::int32_t> span() const {
        return {static_cast<std::int32_t*>(view_.buf), static_cast<std::size_t>(view_.shape[0])};
    }

  private:
    bool is_format(const char* format) const { return std::string_view(view_.format) == format; }

    Py_buffer view_;
};

// Gives the tree its Python face: buffers in, NumPy arrays and minisgl.cache.base.PrefixMatch out.
class PrefixCache {
  public:
    explicit PrefixCache(std::int64_t page_size)
        : tree_(page_size),
          empty_(nb::module_::import_("numpy").attr("empty")),
          int32_(nb::module_::import_("numpy").attr("dtype")("int32")),
          match_type_(nb::module_::import_("minisgl.cache.base").attr("PrefixMatch")) {}

    RadixTree& tree() { return tree_; }

    nb::object match(nb::handle tokens, std::optional<std::int64_t> limit) {
        const Int32View view(tokens, "tokens");
        const auto [node, num_pages] = tree_.match(limited(view, limit));
        return match_type_(node, filled(num_pages, [&](auto pages) { tree_.copy_pages(node, pages); }));
    }

    std::size_t match_length(nb::handle tokens, std::optional<std::int64_t> limit) const {
        const Int32View view(tokens, "tokens");
        return tree_.match_length(limited(view, limit)) * tree_.page_size();
    }

    nb::tuple insert(nb::handle tokens, nb::handle pages) {
        const Int32View token_view(tokens, "tokens"), page_view(pages, "pages");
        const auto [node, existing] = tree_.insert(token_view.span(), page_view.span());
        return nb::make_tuple(node, existing);
    }

    nb::object evict(std::int64_t num_pages) {
        const std::size_t wanted = static_cast<std::size_t>(std::max<std::int64_t>(num_pages, 0));
        return filled(std::min(wanted, tree_.num_evictable_pages()), [&](auto freed) { tree_.evict(freed); });
    }

    nb::object reset() {
        return filled(tree_.num_pages(), [&](auto freed) { tree_.reset(freed); });
    }

  private:
    static RadixTree::Ids limited(const Int32View& view, std::optional<std::int64_t> limit) {
        const RadixTree::Ids ids = view.span();
        if (!limit) return ids;
        return ids.first(std::min(ids.size(), static_cast<std::size_t>(std::max<std::int64_t>(*limit, 0))));
    }

    // A new int32 array of `size` elements that `write` has filled.
    template <typename Write>
    nb::object filled(std::size_t size, Write write) const {
        nb::object array = empty_(size, int32_);
        write(Int32View(array, "array", PyBUF_WRITABLE).span());
        return array;
    }

    RadixTree tree_;
    nb::object empty_, int32_, match_type_;
};

}  // namespace

NB_MODULE(_C, module) {
    using namespace nb::literals;
    // A server freezes what it has at its start (gc.freeze), and so ends with objects that are still alive.
    nb::set_leak_warnings(false);
    module.def(
        "common_prefix",
        [](nb::handle a, nb::handle b) {
            const Int32View first(a, "a"), second(b, "b");
            return minisgl::common_prefix(first.span(), second.span());
        },
        "a"_a, "b"_a, "The number of leading elements that two int32 buffers share.");
    module.def(
        "compare_by",
        [](std::string_view arm, nb::handle a, nb::handle b) {
            const Int32View first(a, "a"), second(b, "b");
            return minisgl::profiling::compare_by(arm, first.span(), second.span());
        },
        "arm"_a, "a"_a, "b"_a, "common_prefix by one of the laboratory's arms; see csrc/profiling.");
    module.def("compare_ns", &minisgl::profiling::compare_ns, "arm"_a, "size"_a, "calls"_a,
               "Nanoseconds a comparison of `size` equal ids takes by that arm.");
    nb::class_<PrefixCache>(module, "PrefixCache", "The radix tree of csrc/radix; see minisgl.cache.base.PrefixCache.")
        .def(nb::init<std::int64_t>(), "page_size"_a)
        .def_prop_ro("page_size", [](PrefixCache& self) { return self.tree().page_size(); })
        .def_prop_ro("num_pages", [](PrefixCache& self) { return self.tree().num_pages(); })
        .def_prop_ro("num_evictable_pages", [](PrefixCache& self) { return self.tree().num_evictable_pages(); })
        .def("match", &PrefixCache::match, "tokens"_a, "limit"_a = nb::none())
        .def("match_length", &PrefixCache::match_length, "tokens"_a, "limit"_a = nb::none())
        .def("insert", &PrefixCache::insert, "tokens"_a, "pages"_a)
        .def(
            "lock", [](PrefixCache& self, RadixTree::NodeId node) { self.tree().lock(node); }, "node"_a)
        .def(
            "unlock", [](PrefixCache& self, RadixTree::NodeId node) { self.tree().unlock(node); }, "node"_a)
        .def("evict", &PrefixCache::evict, "num_pages"_a)
        .def("reset", &PrefixCache::reset)
        .def("check_integrity", [](PrefixCache& self) { self.tree().check_integrity(); });
    minisgl::cpu::bind(module);
}
