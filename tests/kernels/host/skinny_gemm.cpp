// skinny_gemm on the host, against sums in double: prints ‖out − expected‖ / ‖expected‖. ROWS: of x; BLOCKS: of the
// grid.
#include KERNEL

#include <cstdio>
#include <random>

int main() {
    constexpr int kOutput = GATED ? COLUMNS / 2 : COLUMNS, kXStride = WIDTH + 8, kOutStride = kOutput + 3;
    std::mt19937 engine(1);
    std::normal_distribution<float> normal;
    const auto random = [&](size_t n, float scale) {
        std::vector<T> values(n);
        for (T& v : values) v = from_float<T>(normal(engine) * scale);
        return values;
    };
    std::vector<uint4> store(ROWS * kXStride * 2 / 16 + COLUMNS * WIDTH * 2 / 16 + WIDTH * 2 / 16);  // 16-byte aligned
    T* x = reinterpret_cast<T*>(store.data());
    T* w = x + ROWS * kXStride;
    T* gain = w + COLUMNS * WIDTH;
    const auto fill = [&](T* p, size_t n, float scale) {
        const auto values = random(n, scale);
        std::memcpy(static_cast<void*>(p), values.data(), n * sizeof(T));
    };
    fill(x, ROWS * kXStride, 2), fill(w, COLUMNS * WIDTH, 1 / std::sqrt(float(WIDTH))), fill(gain, WIDTH, 1);
    std::vector<T> out = random(ROWS * kOutStride, 1), before = out;
    launch(BLOCKS, WARPS * 32, [&] { skinny_gemm(x, kXStride, w, gain, 1e-5, out.data(), kOutStride, ROWS); });
    double difference = 0, size = 0;
    for (int row = 0; row < ROWS; ++row) {
        double squares = 0;
        for (int k = 0; k < WIDTH; ++k) squares += std::pow(to_float(x[row * kXStride + k]), 2.0);
        const double factor = NORM ? 1 / std::sqrt(squares / WIDTH + 1e-5) : 1;
        const auto dot = [&](int column) {
            double sum = 0;
            for (int k = 0; k < WIDTH; ++k)
                sum += double(to_float(x[row * kXStride + k])) * (NORM ? to_float(gain[k]) : 1.0f) *
                       to_float(w[column * WIDTH + k]);
            return sum * factor;
        };
        for (int column = 0; column < kOutStride; ++column) {
            const int place = row * kOutStride + column;
            if (column >= kOutput) {
                if (out[place].bits != before[place].bits) return std::puts("wrote outside of its rows"), 1;
                continue;
            }
            double y = dot(column);
            if (GATED) y = y / (1 + std::exp(-y)) * dot(column + COLUMNS / 2);
            if (ADD) y += to_float(before[place]);
            difference += std::pow(y - to_float(out[place]), 2), size += y * y;
        }
    }
    std::printf("%g\n", std::sqrt(difference / size));
}
