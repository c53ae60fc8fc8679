// Runs the CPU kernels on random shapes, in buffers without a byte to spare, and compares them with plain loops: for
// sanitizers, which watch what it reads and writes and how its threads meet. Arguments: a seed, a number of rounds.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "cpu/decoder.hpp"
#include "cpu/thread_pool.hpp"

using namespace minisgl::cpu;

namespace {

std::mt19937 engine;

int random_int(int low, int high) { return std::uniform_int_distribution(low, high)(engine); }

std::vector<float> random_floats(std::size_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> values(count);
    for (float& value : values) value = normal(engine);
    return values;
}

void require(bool ok, const char* what) {
    if (ok) return;
    std::printf("wrong: %s\n", what);
    std::exit(1);
}

void check_product() {
    const auto format = static_cast<Format>(random_int(0, 5));
    const bool plain = format < Format::q8_0;
    const int columns = plain ? random_int(1, 300) : 32 * random_int(1, 20), rows = random_int(1, 150);
    const int m = random_int(0, 40);
    // Blocks of random bits; scales are halves, and mustn't be infinite.
    const std::size_t row_bytes = plain ? block_bytes(format) / 1024 * columns : block_bytes(format) / 1024.0 * columns;
    std::vector<std::byte> source(row_bytes * rows);
    for (std::size_t i = 0; i < source.size(); ++i) source[i] = static_cast<std::byte>(i % 2 ? random_int(40, 60) : 0);
    PackedWeight weight(columns);
    const int split = random_int(0, rows);
    weight.put(format, source.data() + split * row_bytes, (rows - split) * row_bytes, split, rows - split);
    weight.put(format, source.data(), split * row_bytes, 0, split);

    const int stride = weight.padded_columns();
    std::vector<float> x(m * stride), out(m * rows), bias = random_floats(rows), values(rows * columns);
    for (int r = 0; r < m; ++r)
        for (int c = 0; c < columns; ++c) x[r * stride + c] = static_cast<float>(random_int(-4, 4));
    weight.multiply({x.data(), stride}, m, bias.data(), out.data(), rows);
    std::vector<std::int32_t> ids(rows);
    for (int r = 0; r < rows; ++r) ids[r] = r;
    weight.gather(ids.data(), rows, values.data(), columns);
    for (int r = 0; r < m; ++r)
        for (int n = 0; n < rows; ++n) {
            double sum = bias[n], size = std::abs(bias[n]);
            for (int c = 0; c < columns; ++c) {
                sum += static_cast<double>(x[r * stride + c]) * values[n * columns + c];
                size += std::abs(x[r * stride + c] * values[n * columns + c]);
            }
            require(std::abs(out[r * rows + n] - sum) <= 1e-6 * size, "product");
        }
}

void check_attention() {
    const int kv_heads = random_int(1, 3), group = random_int(1, 5), dim = 8 * random_int(1, 12),
              page_size = random_int(1, 9);
    const int num_sequences = random_int(1, 5), heads = kv_heads * group, window = random_int(0, 1) * random_int(1, 90);
    std::vector<std::int32_t> lens, starts{0};
    for (int s = 0; s < num_sequences; ++s) {
        lens.push_back(random_int(1, 200));
        starts.push_back(starts.back() + random_int(1, random_int(1, lens.back())));
    }
    const int width = (200 + page_size - 1) / page_size, num_pages = 30;
    std::vector<std::int32_t> table(num_sequences * width);
    for (auto& page : table) page = random_int(0, num_pages - 1);
    const std::size_t row = static_cast<std::size_t>(kv_heads) * dim;
    const auto keys = random_floats(num_pages * page_size * row), values = random_floats(num_pages * page_size * row);
    const auto q = random_floats(static_cast<std::size_t>(starts.back()) * heads * dim);
    std::vector<float> out(q.size());
    const Attention a{{q.data(), heads * dim},
                      out.data(),
                      heads * dim,
                      keys.data(),
                      values.data(),
                      {table.data(), lens.data(), starts.data(), num_sequences, width, page_size},
                      heads,
                      kv_heads,
                      dim,
                      0.2f,
                      window};
    attend(a, plan_attention(a.paging, heads, kv_heads));
    for (int s = 0; s < num_sequences; ++s)
        for (int t = starts[s]; t < starts[s + 1]; ++t) {
            const int h = random_int(0, heads - 1), own = lens[s] - starts[s + 1] + t;
            const int first = window ? std::max(0, own + 1 - window) : 0;
            std::vector<double> sum(dim);
            double total = 0;
            for (int p = first; p <= own; ++p) {
                const std::size_t slot = table[s * width + p / page_size] * page_size + p % page_size;
                const std::size_t at = slot * row + h / group * dim;
                double score = 0;
                for (int d = 0; d < dim; ++d) score += q[(t * heads + h) * dim + d] * keys[at + d];
                const double weight = std::exp(score * 0.2f);
                total += weight;
                for (int d = 0; d < dim; ++d) sum[d] += weight * values[at + d];
            }
            for (int d = 0; d < dim; ++d)
                require(std::abs(out[(t * heads + h) * dim + d] - sum[d] / total) < 1e-4, "attention");
        }
}

void check_rows() {
    const int size = 2 * random_int(1, 100);
    auto x = random_floats(size), residual = random_floats(size), weight = random_floats(size),
         up = random_floats(size);
    std::vector<float> out(size), sum(size);
    double squares = 0;
    for (int i = 0; i < size; ++i) sum[i] = residual[i] + x[i], squares += static_cast<double>(sum[i]) * sum[i];
    kernels().rms_norm(x.data(), residual.data(), weight.data(), 1e-5f, size, out.data());
    for (int i = 0; i < size; ++i)
        require(std::abs(out[i] - sum[i] / std::sqrt(squares / size + 1e-5) * weight[i]) < 1e-4, "norm");
    kernels().silu_mul(x.data(), up.data(), size, out.data());
    for (int i = 0; i < size; ++i)
        require(std::abs(out[i] - x[i] / (1 + std::exp(-static_cast<double>(x[i]))) * up[i]) < 1e-5, "silu");
    kernels().rotate(x.data(), weight.data(), up.data(), size);
}

}  // namespace

int main(int argc, char** argv) {
    require(argc == 3, "arguments");
    engine.seed(static_cast<unsigned>(std::atoi(argv[1])));
    for (int i = 0; i < std::atoi(argv[2]); ++i) {
        for (const std::string_view name : available_kernels()) {
            select_kernels(name);
            check_product();
            check_attention();
            check_rows();
        }
        ThreadPool::instance().resize(random_int(1, 4));
    }
}
