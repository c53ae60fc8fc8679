#include "cpu/packed_weight.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/thread_pool.hpp"

namespace minisgl::cpu {

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx512, kernels_avx2;
#endif

namespace {

constexpr int kRowsAtOnce = 256;  // of x: what several panels meet again should stay in the second-level cache

std::vector<const Kernels*> find_kernels() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx2 && avx512) found.push_back(&kernels_avx512);
    if (avx2) found.push_back(&kernels_avx2);
#endif
    found.push_back(&kernels_portable);
    return found;
}

const Kernels* selected = find_kernels().front();

// Memory for weights, in regions of huge pages where the system has them: streaming through weights is what a decode
// step does, and it is up to half again as fast. A region is freed with the last part of it.
std::shared_ptr<std::byte> allocate(std::size_t bytes) {
    constexpr std::size_t kHugePage = 2 << 20, kRegion = 16 << 20;
    static std::weak_ptr<std::byte> region;
    static std::size_t used;
    bytes = (bytes + 63) / 64 * 64;
    std::shared_ptr<std::byte> base = region.lock();
    if (base == nullptr || used + bytes > kRegion) {
        const std::size_t size = (std::max(bytes, kRegion) + kHugePage - 1) / kHugePage * kHugePage;
        auto* memory = static_cast<std::byte*>(std::aligned_alloc(kHugePage, size));
        if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
        madvise(memory, size, MADV_HUGEPAGE);
#endif
        base = {memory, [](std::byte* m) { std::free(m); }};
        if (bytes > kRegion) return base;
        region = base, used = 0;
    }
    used += bytes;
    return {base, base.get() + used - bytes};
}

// -- packing: one row of one block, from a checkpoint's order into a panel's ---------------------------------------

template <class T>
void pack_values(const T* values, int count, int row, std::byte* block) {
    T* to = reinterpret_cast<T*>(block) + row;
    for (int i = 0; i < count; ++i) to[i * kPanel] = values[i];
}

// GGUF's q8_0: a scale, then 32 int8. q4_0: a scale, then 16 bytes of columns i (low half) and i + 16. q4_1: a minimum
// after the scale.
void pack_blocks(Format format, const std::byte* from, int row, std::byte* block) {
    for (int n = format == Format::q4_1 ? 2 : 1; n > 0; --n, from += 2, block += 2 * kPanel)
        std::memcpy(block + 2 * row, from, 2);
    if (format == Format::q8_0) return pack_values(from, kBlock, row, block);
    for (int c = 0; c < kBlock; c += 8) {
        std::uint32_t word = 0;
        for (int i = 0; i < 8; ++i) {
            const auto byte = std::to_integer<std::uint32_t>(from[(c + i) % 16]);
            word |= (c + i < 16 ? byte & 15 : byte >> 4) << (4 * i);
        }
        std::memcpy(block + (c / 8 * kPanel + row) * 4, &word, 4);
    }
}

std::size_t source_block_bytes(Format format) { return block_bytes(format) / kPanel; }

}  // namespace

const Kernels& kernels() { return *selected; }

std::vector<std::string_view> available_kernels() {
    std::vector<std::string_view> names;
    for (const Kernels* k : find_kernels()) names.emplace_back(k->name);
    return names;
}

void select_kernels(std::string_view name) {
    for (const Kernels* k : find_kernels())
        if (name == k->name) {
            selected = k;
            return;
        }
    throw std::invalid_argument("this processor has no kernels called " + std::string(name));
}

Format format_of(std::string_view name) {
    constexpr std::string_view names[] = {"f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"};  // in the order of Format
    const auto* found = std::find(std::begin(names), std::end(names), name);
    if (found == std::end(names)) throw std::invalid_argument("there is no packed format " + std::string(name));
    return static_cast<Format>(found - std::begin(names));
}

PackedWeight::PackedWeight(int columns) : columns_(columns) {
    if (columns < 1) throw std::invalid_argument("a weight needs columns");
}

void PackedWeight::put(Format format, const std::byte* source, std::size_t num_bytes, int first, int rows) {
    const bool plain = format == Format::f32 || format == Format::f16 || format == Format::bf16;
    if (!plain && columns_ % kBlock != 0) throw std::invalid_argument("blocks need a multiple of 32 columns");
    const int num_blocks = padded_columns() / kBlock, num_panels = padded(rows, kPanel) / kPanel;
    const std::size_t block = block_bytes(format), from_block = source_block_bytes(format);
    const std::size_t row_bytes = plain ? from_block / kBlock * columns_ : from_block * num_blocks;
    if (row_bytes * rows != num_bytes) throw std::invalid_argument("rows to pack are of another size");
    const std::size_t total = block * num_blocks * num_panels;
    const std::shared_ptr<std::byte> memory = allocate(total);
    ThreadPool::instance().run(num_panels, [&](int p) {
        std::byte* panel = memory.get() + p * num_blocks * block;
        std::memset(panel, 0, num_blocks * block);
        for (int row = 0; row < std::min(kPanel, rows - p * kPanel); ++row) {
            const auto* from = source + (p * kPanel + row) * row_bytes;
            for (int b = 0; b < num_blocks; ++b, from += from_block) {
                const int count = std::min(kBlock, columns_ - b * kBlock);
                std::byte* to = panel + b * block;
                if (format == Format::f32)
                    pack_values(reinterpret_cast<const float*>(from), count, row, to);
                else if (plain)
                    pack_values(reinterpret_cast<const std::uint16_t*>(from), count, row, to);
                else
                    pack_blocks(format, from, row, to);
            }
        }
    });
    for (int p = 0; p < num_panels; ++p)
        parts_.push_back({{format, memory.get() + p * num_blocks * block, num_blocks},
                          first + p * kPanel,
                          std::min(kPanel, rows - p * kPanel)});
    std::sort(parts_.begin(), parts_.end(), [](const Part& a, const Part& b) { return a.first < b.first; });
    num_bytes_ += total;
    memory_.push_back(memory);
}

void PackedWeight::multiply(Rows x, int m, const float* bias, float* out, std::ptrdiff_t out_stride) const {
    ThreadPool& pool = ThreadPool::instance();
    const int num_parts = static_cast<int>(parts_.size()), chunks = std::min(num_parts, 8 * pool.size());
    for (int first = 0; first < m; first += kRowsAtOnce) {
        const int count = std::min(kRowsAtOnce, m - first);
        const Rows rows{x.data + first * x.stride, x.stride};
        pool.run(chunks, [&](int c) {
            float* scratch = thread_scratch((kScratchBlocks * kBlock + kRowsAtOnce) * kPanel);
            for (int i = c * num_parts / chunks; i < (c + 1) * num_parts / chunks; ++i) {
                const Part& part = parts_[i];
                kernels().multiply(part.panel, rows, count, bias != nullptr ? bias + part.first : nullptr,
                                   out + first * out_stride + part.first, out_stride, part.count, scratch);
            }
        });
    }
}

void PackedWeight::gather(const std::int32_t* ids, int count, float* out, std::ptrdiff_t out_stride) const {
    ThreadPool::instance().run(count, [&](int i) {
        float* block = thread_scratch(kBlock * kPanel);
        const auto after = std::upper_bound(parts_.begin(), parts_.end(), ids[i],
                                            [](int id, const Part& part) { return id < part.first; });
        const Part& part = *std::prev(after);
        for (int b = 0; b < part.panel.num_blocks; ++b) {
            kernels().expand(part.panel.format, part.panel.data + b * block_bytes(part.panel.format), block);
            for (int c = 0; c < std::min(kBlock, columns_ - b * kBlock); ++c)
                out[i * out_stride + b * kBlock + c] = block[c * kPanel + ids[i] - part.first];
        }
    });
}

}  // namespace minisgl::cpu
