// The CPU kernels, for the instruction set that the including file is compiled for.
//
// Vectors are GCC's and Clang's vector extensions: the same source gives AVX-512, AVX2, SSE2 and NEON. Everything is in
// an anonymous namespace and uses no function of the standard library that could be kept for another file.
#include <cstring>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/kernels.hpp"

namespace minisgl::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16, MAX_ROWS = 12;  // lanes of a vector; rows of x in a register tile: 24 of 32 registers
#elif defined(__AVX2__)
constexpr int W = 8, MAX_ROWS = 6;  // 12 of 16 registers
#else
constexpr int W = 4, MAX_ROWS = 6;
#endif
constexpr int VECS = 2;      // vectors side by side in a register tile
constexpr int AHEAD = 4096;  // bytes: how far ahead of its use a weight is asked for
constexpr int MAX_DIRECT =
    4;  // up to this many rows of x, weights are expanded in registers; beyond, once into scratch

using Vec = float __attribute__((vector_size(4 * W)));
using IVec = std::int32_t __attribute__((vector_size(4 * W)));
using UVec = std::uint32_t __attribute__((vector_size(4 * W)));
using Halves = std::uint16_t __attribute__((vector_size(2 * W)));
using Bytes = std::int8_t __attribute__((vector_size(W)));

template <class T>
inline T load(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

inline Vec splat(float x) { return x - Vec{}; }

inline void prefetch(const void* from, std::size_t bytes) {
    for (std::size_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

template <class To, class From>
inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    return load<To>(&from);
}

inline Vec from_f16(const void* from) {
#if defined(__AVX512F__)
    return _mm512_maskz_cvtph_ps(0xffff, load<__m256i>(from));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(load<__m128i>(from));
#else
    // Exact for all but infinities and NaN: the exponent is moved to its place and rebased by a multiplication.
    const UVec h = __builtin_convertvector(load<Halves>(from), UVec);
    const Vec magnitude = bits<Vec>((h & 0x7fff) << 13) * 0x1p112f;
    return bits<Vec>(bits<UVec>(magnitude) | (h & 0x8000) << 16);
#endif
}

// GCC 12 takes the general conversion apart, lane by lane.
inline IVec widen(const void* from) {
#if defined(__AVX512F__)
    return (IVec)_mm512_maskz_cvtepi8_epi32(0xffff, load<__m128i>(from));
#elif defined(__AVX2__)
    return (IVec)_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from)));
#else
    return __builtin_convertvector(load<Bytes>(from), IVec);
#endif
}

// -- weights: how a format yields the values of one column, for VECS × W rows --------------------------------------

template <Format FORMAT>
struct Plain {
    static constexpr Format format = FORMAT;
    static constexpr int SIZE = FORMAT == Format::f32 ? 4 : 2;
    const std::byte* at;
    Plain(const std::byte* block, int row) : at(block + SIZE * row) {}
    void begin(int) {}
    Vec value(int column, int v) const {
        const std::byte* from = at + SIZE * (column * kPanel + v * W);
        if constexpr (FORMAT == Format::f32) return load<Vec>(from);
        if constexpr (FORMAT == Format::f16) return from_f16(from);
        return bits<Vec>(__builtin_convertvector(load<Halves>(from), UVec) << 16);
    }
};
using F32 = Plain<Format::f32>;

struct Q8 {
    static constexpr Format format = Format::q8_0;
    const std::byte* at;
    Vec scale[VECS];
    Q8(const std::byte* block, int row) : at(block + 2 * kPanel + row) {
        for (int v = 0; v < VECS; ++v) scale[v] = from_f16(block + 2 * (row + v * W));
    }
    void begin(int) {}
    Vec value(int column, int v) const {
        return __builtin_convertvector(widen(at + column * kPanel + v * W), Vec) * scale[v];
    }
};

template <bool HAS_MINIMUM>
struct Q4 {
    static constexpr Format format = HAS_MINIMUM ? Format::q4_1 : Format::q4_0;
    const std::byte* at;
    Vec scale[VECS], minimum[VECS];
    UVec words[VECS];
    Q4(const std::byte* block, int row) : at(block + (HAS_MINIMUM ? 4 : 2) * kPanel + 4 * row) {
        for (int v = 0; v < VECS; ++v) {
            scale[v] = from_f16(block + 2 * (row + v * W));
            minimum[v] = HAS_MINIMUM ? from_f16(block + 2 * (kPanel + row + v * W)) : -8 * scale[v];
        }
    }
    void begin(int column) {
        for (int v = 0; v < VECS; ++v) words[v] = load<UVec>(at + column / 8 * 4 * kPanel + 4 * v * W);
    }
    Vec value(int column, int v) const {
        const UVec shifted = words[v] >> (column % 8 * 4);
#if defined(__AVX512F__)
        // The lookup takes the low four bits of each lane: no mask, no conversion.
        const Vec quants = _mm512_maskz_permutexvar_ps(
            0xffff, (__m512i)shifted, _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
#else
        const Vec quants = __builtin_convertvector(bits<IVec>(shifted & 15), Vec);
#endif
        return quants * scale[v] + minimum[v];
    }
};

// -- matrix product ------------------------------------------------------------------------------------------------

// Where a product goes: out[r, :] = start[r, :] + …
struct Target {
    float* out;
    std::ptrdiff_t stride;
    const float* start;
    std::ptrdiff_t start_stride;

    Target at(int row, int column) const {
        return {out + row * stride + column, stride, start + row * start_stride + column, start_stride};
    }
};

// Weights that are wanted later: a tile asks for some of them with each of its blocks, so that they come while it
// works. (The hardware looks ahead too, but not over the end of a page, and not while there is nothing to read.)
struct Ahead {
    const std::byte* data;
    std::size_t block_bytes;
};

// For ROWS rows of x and VECS × W rows of a panel. Few rows of x take several accumulators each, so that additions
// don't wait for one another.
template <class F, int ROWS>
void tile(const std::byte* data, int num_blocks, int row, Rows x, Target to, Ahead ahead) {
    constexpr int PHASES = ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1;
    constexpr std::size_t bytes = block_bytes(F::format);
    Vec sums[PHASES][ROWS][VECS] = {};
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECS; ++v) sums[0][r][v] = load<Vec>(to.start + r * to.start_stride + v * W);
    for (int b = 0; b < num_blocks; ++b) {
        prefetch(ahead.data + b * ahead.block_bytes, ahead.block_bytes);
        F block(data + b * bytes, row);
        const float* columns = x.data + b * kBlock;
        for (int c = 0; c < kBlock; c += 8) {
            block.begin(c);
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) {
                Vec weights[VECS];
#pragma GCC unroll 2
                for (int v = 0; v < VECS; ++v) weights[v] = block.value(c + i, v);
#pragma GCC unroll 12
                for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
                    for (int v = 0; v < VECS; ++v) sums[i % PHASES][r][v] += weights[v] * columns[r * x.stride + c + i];
            }
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECS; ++v) {
            Vec sum = sums[0][r][v];
            for (int p = 1; p < PHASES; ++p) sum += sums[p][r][v];
            store(to.out + r * to.stride + v * W, sum);
        }
}

template <class F, int MAX>
void tile_of(int rows, const std::byte* data, int num_blocks, int row, Rows x, Target to, Ahead ahead) {
    if constexpr (MAX > 1)
        if (rows < MAX) return tile_of<F, MAX - 1>(rows, data, num_blocks, row, x, to, ahead);
    tile<F, MAX>(data, num_blocks, row, x, to, ahead);
}

// Some blocks of a panel: the rows of x in register tiles of nearly the same height.
template <class F, int MAX>
void tiles(const std::byte* data, int num_blocks, Rows x, int m, Target to, Ahead ahead) {
    const int count = (m + MAX - 1) / MAX;
    for (int i = 0; i < count; ++i) {
        const int first = i * m / count, rows = (i + 1) * m / count - first;
        const Rows part{x.data + first * x.stride, x.stride};
        for (int row = 0; row < kPanel; row += VECS * W) {
            tile_of<F, MAX>(rows, data, num_blocks, row, part, to.at(first, row), ahead);
            ahead.block_bytes = 0;
        }
    }
}

template <class F>
void expand_block(const std::byte* data, float* out) {
    for (int row = 0; row < kPanel; row += VECS * W) {
        F block(data, row);
        for (int c = 0; c < kBlock; c += 8) {
            block.begin(c);
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i)
                for (int v = 0; v < VECS; ++v) store(out + (c + i) * kPanel + row + v * W, block.value(c + i, v));
        }
    }
}

template <class F>
void multiply_panel(Panel panel, Rows x, int m, Target to, float* scratch) {
    constexpr std::size_t bytes = block_bytes(F::format), expanded = kBlock * kPanel;
    constexpr int MAX = F::format == Format::f32 ? MAX_ROWS : MAX_DIRECT;
    if (F::format == Format::f32 || m <= MAX)
        return tiles<F, MAX>(panel.data, panel.num_blocks, x, m, to, {panel.data + AHEAD, bytes});
    for (int first = 0; first < panel.num_blocks; first += kScratchBlocks) {
        const int count = panel.num_blocks - first < kScratchBlocks ? panel.num_blocks - first : kScratchBlocks;
        for (int b = 0; b < count; ++b) expand_block<F>(panel.data + (first + b) * bytes, scratch + b * expanded);
        const Rows columns{x.data + first * kBlock, x.stride};
        const Ahead ahead{panel.data + (first + count) * bytes, bytes};  // perhaps the next panel's
        tiles<F32, MAX_ROWS>(reinterpret_cast<std::byte*>(scratch), count, columns, m, to, ahead);
        to.start = to.out, to.start_stride = to.stride;
    }
}

// In the order of Format.
constexpr decltype(&multiply_panel<F32>) MULTIPLY[] = {
    multiply_panel<F32>, multiply_panel<Plain<Format::f16>>, multiply_panel<Plain<Format::bf16>>,
    multiply_panel<Q8>,  multiply_panel<Q4<false>>,          multiply_panel<Q4<true>>};
constexpr decltype(&expand_block<F32>) EXPAND[] = {
    expand_block<F32>, expand_block<Plain<Format::f16>>, expand_block<Plain<Format::bf16>>,
    expand_block<Q8>,  expand_block<Q4<false>>,          expand_block<Q4<true>>};

void multiply(Panel panel, Rows x, int m, const float* bias, float* out, std::ptrdiff_t out_stride, int num_columns,
              float* scratch) {
    const std::size_t row_bytes = sizeof(float) * static_cast<std::size_t>(num_columns);
    float start[kPanel] = {};
    if (bias != nullptr) std::memcpy(start, bias, row_bytes);
    Target to{out, out_stride, start, 0};
    // The last panel of a weight may have fewer rows than a tile writes.
    if (num_columns < kPanel) to.out = scratch + kScratchBlocks * kBlock * kPanel, to.stride = kPanel;
    MULTIPLY[static_cast<int>(panel.format)](panel, x, m, to, scratch);
    if (num_columns < kPanel)
        for (int r = 0; r < m; ++r) std::memcpy(out + r * out_stride, to.out + r * kPanel, row_bytes);
}

void expand(Format format, const std::byte* block, float* out) { EXPAND[static_cast<int>(format)](block, out); }

// -- between the products ------------------------------------------------------------------------------------------

template <int... LANES>
inline Vec pick(Vec a, Vec b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, LANES...);
#else
    return __builtin_shuffle(a, b, IVec{LANES...});
#endif
}

using Lanes = std::make_integer_sequence<int, W>;

// op over all lanes; in each round a lane meets the one STEP away.
template <int STEP = W / 2, class Op, int... LANES>
inline float reduce(Vec v, Op op, std::integer_sequence<int, LANES...> lanes) {
    v = op(v, pick<(LANES ^ STEP)...>(v, v));
    if constexpr (STEP > 1) return reduce<STEP / 2>(v, op, lanes);
    return v[0];
}

inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

void rms_norm(const float* x, float* residual, const float* weight, float eps, int size, float* out) {
    if (residual != nullptr) {
        for (int i = 0; i < size; ++i) residual[i] += x[i];
        x = residual;
    }
    Vec squares[2] = {};
    int i = 0;
    for (; i + 2 * W <= size; i += 2 * W)
        for (int v = 0; v < 2; ++v) squares[v] += load<Vec>(x + i + v * W) * load<Vec>(x + i + v * W);
    float sum = reduce(squares[0] + squares[1], add, Lanes());
    for (; i < size; ++i) sum += x[i] * x[i];
    const float factor = 1 / __builtin_sqrtf(sum / static_cast<float>(size) + eps);
    for (i = 0; i < size; ++i) out[i] = x[i] * factor * weight[i];
}

void rotate(float* head, const float* cos, const float* sin, int size) {
    const int half = size / 2;
    for (int i = 0; i < half; ++i) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cos[i] + b * sin[i];
        head[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

// 2^x to 2 ulp; 0 for x ≤ -127, and x is taken to be at most 127. x = n + f, |f| ≤ 1/2: the bits of 2^n, and Taylor's
// series.
inline Vec exp2(Vec x) {
    x = larger(x, splat(-127));
    x = x < splat(127) ? x : splat(127);
    const Vec magic = splat(0x1.8p23f);  // adding it rounds to whole numbers
    const Vec n = (x + magic) - magic, f = (x - n) * 0.693147180559945f;
    Vec power = splat(1.0f / 5040);
    constexpr float coefficients[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (const float c : coefficients) power = power * f + c;
    return power * bits<Vec>((__builtin_convertvector(n, IVec) + 127) << 23);
}

void silu_mul(const float* gate, const float* up, int size, float* out) {
    const auto act = [](Vec g, Vec u) { return g * u / (1 + exp2(g * -1.44269504088896f)); };
    int i = 0;
    for (; i + W <= size; i += W) store(out + i, act(load<Vec>(gate + i), load<Vec>(up + i)));
    for (; i < size; ++i) out[i] = act(splat(gate[i]), splat(up[i]))[0];
}

// -- attention -----------------------------------------------------------------------------------------------------

// Lanes with the bit STEP: b[lane - STEP] + b[lane]; the others: a[lane] + a[lane + STEP].
template <int STEP, int... LANES>
inline Vec fold(Vec a, Vec b, std::integer_sequence<int, LANES...>) {
    return pick<(LANES & STEP ? LANES - STEP + W : LANES)...>(a, b) +
           pick<(LANES & STEP ? LANES + W : LANES + STEP)...>(a, b);
}

// Lane i of the result: the sum of vectors[i]'s lanes. In each round two vectors become one.
template <int STEP = W / 2>
inline Vec sum_each(Vec* vectors) {
#pragma GCC unroll 8
    for (int i = 0; i < STEP; ++i) vectors[i] = fold<STEP>(vectors[i], vectors[i + STEP], Lanes());
    if constexpr (STEP > 1)
        return sum_each<STEP / 2>(vectors);
    else
        return vectors[0];
}

// scores[r, t] = q[r] · keys[t] for `count` tokens, rounded up to W.
void score(const float* q, int rows, int width, const float* const* keys, int count, float* scores) {
    for (int r = 0; r < rows; ++r, q += width)
        for (int t = 0; t < count; t += W) {
            Vec sums[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) sums[i] = load<Vec>(q) * load<Vec>(keys[t + i]);
            for (int d = W; d < width; d += W) {
                const Vec part = load<Vec>(q + d);
#pragma GCC unroll 16
                for (int i = 0; i < W; ++i) sums[i] += part * load<Vec>(keys[t + i] + d);
            }
            store(scores + r * kTile + t, sum_each(sums));
        }
}

// One row of scores, of positions first …, becomes weights relative to the row's highest score so far (in powers of 2).
// What is outside [low, high) is no part of it. Returns the factor that earlier sums of this row must take.
float soften(float* scores, int count, int low, int high, float& highest, float& total) {
    IVec lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    Vec best = splat(highest);
    for (int t = 0; t < count; t += W) {
        const IVec at = lane + t;
        const Vec seen = ((at >= low) & (at < high)) ? load<Vec>(scores + t) : splat(-__builtin_inff());
        store(scores + t, seen);
        best = larger(best, seen);
    }
    const float top = reduce(best, larger, Lanes());
    Vec sum{};
    for (int t = 0; t < count; t += W) {
        const Vec weights = exp2(load<Vec>(scores + t) - top);
        store(scores + t, weights);
        sum += weights;
    }
    const float factor = exp2(splat(highest - top))[0];
    highest = top;
    total = total * factor + reduce(sum, add, Lanes());
    return factor;
}

// out[r, :] = out[r, :] · factors[r] + weights[r, :] · values, ROWS rows and N vectors at a time.
template <int ROWS, int N>
void mix_tile(const float* weights, const float* const* values, int count, int d, int width, float* out) {
    Vec sums[ROWS][N];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < N; ++v) sums[r][v] = load<Vec>(out + r * width + d + v * W);
    for (int t = 0; t < count; ++t) {
        Vec value[N];
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) value[v] = load<Vec>(values[t] + d + v * W);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < N; ++v) sums[r][v] += value[v] * weights[r * kTile + t];
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < N; ++v) store(out + r * width + d + v * W, sums[r][v]);
}

template <int ROWS = 4>
void mix(const float* weights, int rows, const float* const* values, int count, int width, float* out) {
    for (; rows >= ROWS; rows -= ROWS, weights += ROWS * kTile, out += ROWS * width) {
        int d = 0;
        for (; d + 2 * W <= width; d += 2 * W) mix_tile<ROWS, 2>(weights, values, count, d, width, out);
        if (d < width) mix_tile<ROWS, 1>(weights, values, count, d, width, out);
    }
    if constexpr (ROWS > 1) mix<ROWS - 1>(weights, rows, values, count, width, out);
}

// Where `count` tokens from position `first` on lie, for one KV head: in the pool, or in `copies` where heads aren't
// whole vectors. The list is filled up to a whole vector's worth with the last one.
void find_tokens(const Attention& a, const float* pool, const std::int32_t* pages, int kv_head, int first, int count,
                 int width, float* copies, const float** found) {
    const int page_size = a.paging.page_size;
    int page = first / page_size, offset = first % page_size;
    for (int t = 0; t < count; ++t) {
        const std::ptrdiff_t slot = static_cast<std::ptrdiff_t>(pages[page]) * page_size + offset;
        if (++offset == page_size) offset = 0, ++page;
        const float* at = pool + (slot * a.num_kv_heads + kv_head) * a.head_dim;
        if (width != a.head_dim) {
            float* copy = copies + t * width;
            for (int d = 0; d < width; ++d) copy[d] = d < a.head_dim ? at[d] : 0;
            at = copy;
        }
        prefetch(at, 4 * width);
        found[t] = at;
    }
    for (int t = count; t < padded(count, W); ++t) found[t] = found[count - 1];
}

// Softmax in one pass over the tokens (Milakov and Gimelshein 2018; tiles as in Dao et al. 2022).
void attend(const Attention& a, const AttentionPart& part, float* scratch) {
    const int group = a.num_heads / a.num_kv_heads, rows = part.count * group, width = padded(a.head_dim, W);
    float* q = scratch;                   // [rows, width], scaled
    float* sums = q + rows * width;       // [rows, width]
    float* scores = sums + rows * width;  // [rows, kTile]
    float *highest = scores + rows * kTile, *totals = highest + rows;
    float *keys = totals + rows, *values = keys + kTile * width;
    const int dim = a.head_dim;
    const float log2_scale = a.scale * 1.44269504088896f;
    std::memset(q, 0, sizeof(float) * static_cast<std::size_t>(2 * rows * width));
    for (int r = 0; r < rows; ++r) {
        const float* from = a.q.data + (part.first + r / group) * a.q.stride + (part.kv_head * group + r % group) * dim;
        for (int d = 0; d < dim; ++d) q[r * width + d] = from[d] * log2_scale;
        highest[r] = -1e30f, totals[r] = 0;
    }
    const std::int32_t* pages =
        a.paging.page_table + static_cast<std::ptrdiff_t>(part.sequence) * a.paging.table_stride;
    // position of the first query, and the range of tokens that any query sees
    const int position = a.paging.seq_lens[part.sequence] - (a.paging.query_starts[part.sequence + 1] - part.first);
    const int begin = a.window > 0 && position + 1 > a.window ? position + 1 - a.window : 0,
              end = position + part.count;
    const float *found_keys[kTile], *found_values[kTile];
    const auto find_keys = [&](int first, int count) {
        find_tokens(a, a.keys, pages, part.kv_head, first, count, width, keys, found_keys);
    };
    const auto size = [end](int first) { return end - first < kTile ? end - first : kTile; };
    find_keys(begin, size(begin));
    for (int first = begin; first < end;
         first += kTile) {  // what comes next is looked up, and so fetched, before its turn
        const int count = size(first), next = first + kTile;
        find_tokens(a, a.values, pages, part.kv_head, first, count, width, values, found_values);
        score(q, rows, width, found_keys, count, scores);
        if (next < end) find_keys(next, size(next));
        for (int r = 0; r < rows; ++r) {
            const int own = position + r / group;
            const int low = a.window > 0 ? own + 1 - a.window - first : 0;
            const float factor = soften(scores + r * kTile, count, low, own + 1 - first, highest[r], totals[r]);
            if (factor != 1)
                for (int d = 0; d < width; ++d) sums[r * width + d] *= factor;
        }
        mix(scores, rows, found_values, count, width, sums);
    }
    for (int r = 0; r < rows; ++r) {
        float* to = a.out + (part.first + r / group) * a.out_stride + (part.kv_head * group + r % group) * dim;
        const float factor = 1 / totals[r];
        for (int d = 0; d < dim; ++d) to[d] = sums[r * width + d] * factor;
    }
}

}  // namespace
}  // namespace minisgl::cpu

#define MINISGL_CPU_KERNELS(NAME) {NAME, multiply, expand, rms_norm, rotate, silu_mul, attend}
