// The step on a CPU: statistics, coordinate network, scaling; float32.
//
// Plain C functions on pointers, so that a compiler builds this file in seconds and without torch's headers. Matrix k is
// (d[k], p[k]) with row stride pitch[k] and inner stride 1; the values of its rows and columns are at rows[k] and
// columns[k] in packed vectors (layout.py). Vectors are GCC vector extensions of 16 floats: one register with AVX-512,
// several elsewhere. Matrices and segments are handed out to threads whole, and every sum has a fixed order, so results
// do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Int __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

constexpr float FLOOR = 1e-6f;  // both as in reference.py
constexpr float TINY = 1e-30f;

inline Vec load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<Unaligned*>(to) = value; }
inline Vec splat(float value) { return Vec{} + value; }

// Keep a value that several products use in a register: the compiler would load it for each of them.
inline Vec in_register(Vec value) {
#if defined(__AVX512F__)
    asm("" : "+v"(value));
#endif
    return value;
}

inline float total(Vec value) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) value[i] += value[i + half];
    return value[0];
}

// The sums of 8 vectors at once: each level adds even and odd lanes of two of them.
inline void totals(const Vec* sums, float* to) {
#if defined(__clang__)
    auto add = [](Vec a, Vec b) {
        return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
               __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    };
#else
    const Int even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    auto add = [=](Vec a, Vec b) { return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1); };
#endif
    const Vec low = add(add(sums[0], sums[1]), add(sums[2], sums[3]));
    const Vec high = add(add(sums[4], sums[5]), add(sums[6], sums[7]));
    const Vec pairs = add(low, high);
    const Vec result = add(pairs, pairs);
    std::memcpy(to, &result, 8 * sizeof(float));
}

// Store past the caches, which hold less than all directions: its line need not be fetched first.
inline void stream(float* to, Vec value) {
#if defined(__AVX512F__)
    _mm512_stream_ps(to, (__m512)value);
#elif defined(__AVX__)
    __m256 halves[2];
    std::memcpy(halves, &value, sizeof value);
    _mm256_stream_ps(to, halves[0]);
    _mm256_stream_ps(to + 8, halves[1]);
#else
    store(to, value);
#endif
}

inline void fence() {
#if defined(__AVX__)
    _mm_sfence();
#endif
}

// Comparisons with NaN are false, so the clamps below let it through.
inline Vec clamp(Vec x, float low, float high) {
#if defined(__AVX512F__)
    // The second operand is returned where one is NaN.
    return (Vec)_mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), (__m512)x));
#else
    x = x < low ? splat(low) : x;
    return x > high ? splat(high) : x;
#endif
}

// 2^n as a number, for |n| < 127.
inline Vec power_of_two(Int n) { return (Vec)((n + 127) << 23); }

// exp: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (coefficients of Moshier's Cephes library), relative error 2e-7.
// Good from -87 to 88, which is as far as exp is a normal number; NaN stays NaN.
inline Vec bounded_exp(Vec x) {
    const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    const Vec shifted = x * 1.44269504088896341f + magic;
    const Vec whole = shifted - magic;
    const Vec r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * power_of_two((Int)shifted - (Int)magic);
}

// log of a positive number: exponent, and a polynomial of the mantissa in [sqrt(1/2), sqrt(2)); inf and NaN stay.
inline Vec log_of(Vec given) {
    const Int n = ((Int)given - 0x3f3504f3) >> 23;
    const Vec r = (Vec)((Int)given - (n << 23)) - 1.0f;
    const Vec e = __builtin_convertvector(n, Vec);
    const Vec z = r * r;
    Vec p = splat(7.0376836292e-2f);
    p = p * r - 1.1514610310e-1f;
    p = p * r + 1.1676998740e-1f;
    p = p * r - 1.2420140846e-1f;
    p = p * r + 1.4249322787e-1f;
    p = p * r - 1.6668057665e-1f;
    p = p * r + 2.0000714765e-1f;
    p = p * r - 2.4999993993e-1f;
    p = p * r + 3.3333331174e-1f;
    const Vec result = r + (p * r * z + e * -2.12194440e-4f - 0.5f * z) + e * 0.693359375f;
    return given < INFINITY ? result : given;
}

// Sums of float32 numbers are taken in float32 over so many at most, and those sums in double.
constexpr int64_t BLOCK_ROWS = 512, BLOCK_COLUMNS = 4096;

// ROWS rows of at most BLOCK_COLUMNS columns at once: each column's sum is loaded and stored once for all of them. Adds to
// `rows` (KINDS, ROWS) and to `columns` (KINDS, stride).
template <int ROWS, bool MOMENTUM>
inline void statistics_of(const float* r, int64_t r_pitch, const float* m, int64_t m_pitch, float* moved,
                          int64_t moved_pitch, int64_t width, float weight, double* rows, float* columns,
                          int64_t stride) {
    constexpr int KINDS = MOMENTUM ? 3 : 1;
    Vec sums[KINDS][ROWS] = {};
    float rest[KINDS][ROWS] = {};
    int64_t j = 0;
    for (; j + LANES <= width; j += LANES) {
        Vec column[KINDS] = {};
        for (int q = 0; q < ROWS; q++) {
            const Vec x = load(r + q * r_pitch + j);
            Vec y = x;
            if (MOMENTUM) {
                y = load(m + q * m_pitch + j);
                store(moved + q * moved_pitch + j, y + weight * (x - y));
            }
            const Vec product[3] = {x * x, y * y, x * y};
            for (int kind = 0; kind < KINDS; kind++) {
                sums[kind][q] += product[kind];
                column[kind] += product[kind];
            }
        }
        for (int kind = 0; kind < KINDS; kind++) {
            float* to = columns + kind * stride + j;
            store(to, load(to) + column[kind]);
        }
    }
    for (; j < width; j++) {
        for (int q = 0; q < ROWS; q++) {
            const float x = r[q * r_pitch + j];
            float y = x;
            if (MOMENTUM) {
                y = m[q * m_pitch + j];
                moved[q * moved_pitch + j] = y + weight * (x - y);
            }
            const float product[3] = {x * x, y * y, x * y};
            for (int kind = 0; kind < KINDS; kind++) {
                rest[kind][q] += product[kind];
                columns[kind * stride + j] += product[kind];
            }
        }
    }
    for (int kind = 0; kind < KINDS; kind++) {
        float sum[ROWS];
        if (ROWS == 8)
            totals(sums[kind], sum);
        else
            for (int q = 0; q < ROWS; q++) sum[q] = total(sums[kind][q]);
        for (int q = 0; q < ROWS; q++) rows[kind * ROWS + q] += sum[q] + rest[kind][q];
    }
}

template <bool MOMENTUM>
void all_statistics(int64_t count, const float* const* r, const int64_t* r_pitch, const float* const* m,
                    const int64_t* m_pitch, float* const* moved, const int64_t* moved_pitch, const int64_t* d,
                    const int64_t* p, const float* weight, float* const* rows, float* const* columns, int64_t stride,
                    [[maybe_unused]] int threads) {
    constexpr int KINDS = MOMENTUM ? 3 : 1;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t k = 0; k < count; k++) {
        const int64_t height = d[k], width = p[k];
        const int64_t mp = MOMENTUM ? m_pitch[k] : 0, op = MOMENTUM ? moved_pitch[k] : 0;
        const float* from = MOMENTUM ? m[k] : nullptr;
        float* to = MOMENTUM ? moved[k] : nullptr;
        const float newest = MOMENTUM ? weight[k] : 0.0f;
        std::vector<float> block(KINDS * width, 0.0f);
        std::vector<double> all(KINDS * width, 0.0);
        auto some = [&](auto rows_at_once, int64_t i) {
            constexpr int ROWS = decltype(rows_at_once)::value;
            double sum[KINDS * ROWS] = {};
            for (int64_t j = 0; j < width; j += BLOCK_COLUMNS)
                statistics_of<ROWS, MOMENTUM>(r[k] + i * r_pitch[k] + j, r_pitch[k], from + i * mp + j, mp,
                                              to + i * op + j, op, std::min(BLOCK_COLUMNS, width - j), newest, sum,
                                              block.data() + j, width);
            for (int kind = 0; kind < KINDS; kind++)
                for (int q = 0; q < ROWS; q++)
                    rows[k][kind * stride + i + q] = (float)(sum[kind * ROWS + q] / width);
        };
        for (int64_t start = 0; start < height; start += BLOCK_ROWS) {
            const int64_t stop = std::min(start + BLOCK_ROWS, height);
            int64_t i = start;
            for (; i + 8 <= stop; i += 8) some(std::integral_constant<int, 8>(), i);
            for (; i < stop; i++) some(std::integral_constant<int, 1>(), i);
            for (int64_t j = 0; j < KINDS * width; j++) {
                all[j] += block[j];
                block[j] = 0.0f;
            }
        }
        for (int kind = 0; kind < KINDS; kind++)
            for (int64_t j = 0; j < width; j++)
                columns[k][kind * stride + j] = (float)(all[kind * width + j] / height);
    }
}

// A layer's sizes and weights, rearranged so that the four gates of a unit are neighbours.
struct Layer {
    int energies, raw, hidden, outputs;
    const float* gates;   // (H, E + Q + H, 4)
    const float* offset;  // (H, 4): bias, context and side of the segment at hand
    const float* head;    // (H, O) of the side at hand
    const float* head_bias;
    const float* skip;  // (E) of the side at hand
};

struct State {
    const float *energies, *means, *raw, *hidden, *cell;
    float *output, *new_hidden, *new_cell;
    int64_t coordinates;  // N, the stride of all of them
};

// VECTORS * 16 neighbouring coordinates of one matrix, the first `count` of them real. `inputs` and `outputs` are
// scratch of (E + Q + 2 H) and O rows.
template <int VECTORS>
void coordinates_of(const Layer& layer, const State& state, int64_t first, int count, const float* denominator,
                    float* inputs, float* outputs) {
    constexpr int WIDTH = VECTORS * LANES;
    const int E = layer.energies, Q = layer.raw, H = layer.hidden, O = layer.outputs, K = E + Q + H;
    const int64_t N = state.coordinates;
    float *cell = inputs + K * WIDTH, *moved = cell + H * WIDTH;
    auto take = [&](const float* from, float* to) {
        if (count == WIDTH) {
            for (int v = 0; v < WIDTH; v += LANES) store(to + v, load(from + first + v));
        } else {
            std::memcpy(to, from + first, 4 * count);
            std::memset(to + count, 0, 4 * (WIDTH - count));
        }
    };
    auto give = [&](const float* from, float* to) {
        if (count == WIDTH)
            for (int v = 0; v < WIDTH; v += LANES) store(to + first + v, load(from + v));
        else
            std::memcpy(to + first, from, 4 * count);
    };
    for (int k = 0; k < E; k++) {
        float* row = inputs + k * WIDTH;
        take(state.energies + k * N, row);
        for (int v = 0; v < WIDTH; v += LANES) store(row + v, 0.5f * log_of(load(row + v) / denominator[k] + FLOOR));
    }
    for (int k = 0; k < Q; k++) take(state.raw + k * N, inputs + (E + k) * WIDTH);
    for (int k = 0; k < H; k++) {
        take(state.hidden + k * N, inputs + (E + Q + k) * WIDTH);
        take(state.cell + k * N, cell + k * WIDTH);
    }
    for (int h = 0; h < H; h++) {
        // The state's rows are far apart: the processor would not see the next block coming.
        for (int v = 0; v < WIDTH; v += LANES) {
            __builtin_prefetch(state.hidden + h * N + first + WIDTH + v);
            __builtin_prefetch(state.cell + h * N + first + WIDTH + v);
        }
        Vec gate[4][VECTORS];
#pragma GCC unroll 4
        for (int g = 0; g < 4; g++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) gate[g][v] = splat(layer.offset[4 * h + g]);
        const float* weight = layer.gates + (int64_t)h * K * 4;
        for (int k = 0; k < K; k++) {
            Vec x[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) x[v] = in_register(load(inputs + k * WIDTH + v * LANES));
#pragma GCC unroll 4
            for (int g = 0; g < 4; g++) {
                const Vec w = splat(weight[4 * k + g]);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) gate[g][v] += w * x[v];
            }
        }
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            // sigmoid(x) = 1 / (1 + e^-x), tanh(x) = (1 - e^-2x) / (1 + e^-2x); one division for three gates. Clamped so
            // that three factors do not overflow; beyond that both are constant in float32, but for less than 1e-12.
            const Vec enter = 1.0f + bounded_exp(clamp(-gate[0][v], -28.0f, 28.0f));
            const Vec forget = 1.0f + bounded_exp(clamp(-gate[1][v], -28.0f, 28.0f));
            const Vec candidate = bounded_exp(clamp(-2.0f * gate[2][v], -28.0f, 28.0f));
            const Vec leave = 1.0f + bounded_exp(clamp(-gate[3][v], -28.0f, 28.0f));
            const Vec both = enter * (1.0f + candidate);
            const Vec c = (load(cell + h * WIDTH + v * LANES) * both + (1.0f - candidate) * forget) / (both * forget);
            const Vec squashed = bounded_exp(clamp(-2.0f * c, -28.0f, 28.0f));
            const Vec out = (1.0f - squashed) / (leave * (1.0f + squashed));
            store(cell + h * WIDTH + v * LANES, c);
            store(moved + h * WIDTH + v * LANES, out);
        }
        give(moved + h * WIDTH, state.new_hidden + h * N);
        give(cell + h * WIDTH, state.new_cell + h * N);
    }
    for (int o = 0; o < O; o++) {
        Vec sum[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sum[v] = splat(layer.head_bias[o]);
        for (int h = 0; h < H; h++) {
            const Vec w = splat(layer.head[h * O + o]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sum[v] += w * load(moved + h * WIDTH + v * LANES);
        }
        if (o == 0)
            for (int v = 0; v < VECTORS; v++) {
                for (int k = 0; k < E; k++) sum[v] += layer.skip[k] * load(inputs + k * WIDTH + v * LANES);
                sum[v] = bounded_exp(clamp(sum[v], -87.0f, 88.0f));
            }
        for (int v = 0; v < VECTORS; v++) store(outputs + v * LANES, sum[v]);
        give(outputs, state.output + o * N);
    }
}

}  // namespace

extern "C" {

// Row and column means of R * R: reads 4 d p bytes a matrix.
void subspace_energy_means(int64_t count, const float* const* r, const int64_t* r_pitch, const int64_t* d, const int64_t* p,
                       float* const* rows, float* const* columns, int threads) {
    all_statistics<false>(count, r, r_pitch, nullptr, nullptr, nullptr, nullptr, d, p, nullptr, rows, columns, 0, threads);
}

// M' = M + weight (R - M), a weight for each matrix, which may be written over M, and the means of R * R, M * M and R * M, `stride` apart:
// reads 8 d p bytes, writes 4 d p.
void subspace_moments(int64_t count, const float* const* r, const int64_t* r_pitch, const float* const* m,
                      const int64_t* m_pitch, float* const* moved, const int64_t* moved_pitch, const int64_t* d,
                      const int64_t* p, const float* weight, float* const* rows, float* const* columns, int64_t stride,
                      int threads) {
    all_statistics<true>(count, r, r_pitch, m, m_pitch, moved, moved_pitch, d, p, weight, rows, columns, stride,
                         threads);
}

// The mean of each segment of `kinds` packed vectors `stride` apart: (kinds, count) results.
void subspace_segment_means(int64_t count, const int64_t* size, const float* values, int64_t kinds, int64_t stride,
                            float* means) {
    for (int64_t kind = 0; kind < kinds; kind++) {
        const float* from = values + kind * stride;
        for (int64_t k = 0; k < count; k++) {
            double sum = 0.0;
            for (int64_t start = 0; start < size[k]; start += BLOCK_COLUMNS) {
                const int64_t stop = std::min(start + BLOCK_COLUMNS, size[k]);
                Vec lanes = {};
                float rest = 0.0f;
                int64_t i = start;
                for (; i + LANES <= stop; i += LANES) lanes += load(from + i);
                for (; i < stop; i++) rest += from[i];
                sum += total(lanes) + rest;
            }
            means[kind * count + k] = (float)(sum / size[k]);
            from += size[k];
        }
    }
}

// The coordinate network; see lstm_cell in reference.py. Segments 0 .. matrices - 1 are the rows of the matrices, the
// others their columns; `size` are their coordinates. New hidden and cell may be written over the old ones.
void subspace_lstm_cell(int64_t matrices, const int64_t* size, int64_t energies, int64_t raw, int64_t context,
                        int64_t hidden, int64_t outputs, const float* energy, const float* mean, const float* raw_value,
                        const float* context_value, const float* weight, const float* bias, const float* head,
                        const float* head_bias, const float* skip, const float* old_hidden, const float* old_cell,
                        float* output, float* new_hidden, float* new_cell, [[maybe_unused]] int threads) {
    const int E = energies, Q = raw, C = context, H = hidden, O = outputs, K = E + Q + H, F = E + Q + C + 1;
    std::vector<int64_t> first(2 * matrices + 1, 0);
    for (int64_t s = 0; s < 2 * matrices; s++) first[s + 1] = first[s] + size[s];
    const int64_t N = first[2 * matrices];
    std::vector<float> gates((size_t)H * K * 4), heads((size_t)2 * H * O);
    for (int h = 0; h < H; h++) {
        for (int k = 0; k < K; k++)
            for (int g = 0; g < 4; g++)
                gates[((size_t)h * K + k) * 4 + g] = weight[(int64_t)(g * H + h) * (F + H) + (k < E + Q ? k : k + C + 1)];
        for (int side = 0; side < 2; side++)
            for (int o = 0; o < O; o++) heads[((size_t)side * H + h) * O + o] = head[(int64_t)(side * O + o) * H + h];
    }
    const State state = {energy, mean, raw_value, old_hidden, old_cell, output, new_hidden, new_cell, N};
    constexpr int WIDE = 4;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> offset(4 * H), denominator(E), inputs((size_t)(K + 2 * H) * WIDE * LANES);
        std::vector<float> out(WIDE * LANES);
#pragma omp for schedule(dynamic)
        for (int64_t s = 0; s < 2 * matrices; s++) {
            const int side = s >= matrices;
            const int64_t b = side ? s - matrices : s;
            for (int h = 0; h < H; h++)
                for (int g = 0; g < 4; g++) {
                    const float* row = weight + (int64_t)(g * H + h) * (F + H) + E + Q;
                    float sum = bias[g * H + h] + (side ? -row[C] : row[C]);
                    for (int c = 0; c < C; c++) sum += row[c] * context_value[c * matrices + b];
                    offset[4 * h + g] = sum;
                }
            for (int k = 0; k < E; k++) denominator[k] = mean[k * matrices + b] + TINY;
            const Layer layer = {E, Q, H, O, gates.data(), offset.data(), heads.data() + (size_t)side * H * O,
                                 head_bias + side * O, skip + side * E};
            int64_t i = first[s];
            for (; i + WIDE * LANES <= first[s + 1]; i += WIDE * LANES)
                coordinates_of<WIDE>(layer, state, i, WIDE * LANES, denominator.data(), inputs.data(), out.data());
            for (; i < first[s + 1]; i += LANES)
                coordinates_of<1>(layer, state, i, (int)std::min<int64_t>(LANES, first[s + 1] - i), denominator.data(),
                                  inputs.data(), out.data());
        }
    }
}

// D = diag(l) (R + mix (M - R)) diag(k), which may be written over R or M, and sum D^2 / p; without m, D = diag(l) R
// diag(k). `past_caches`: D is larger than the caches and not written over an input. Reads 4 d p bytes a matrix, 8 with
// m, writes 4 d p.
void subspace_directions(int64_t count, const float* const* r, const int64_t* r_pitch, const float* const* m,
                         const int64_t* m_pitch, const float* mix, const int64_t* d, const int64_t* p,
                         const float* const* rows, const float* const* columns, float* const* out,
                         const int64_t* out_pitch, float* squares, int past_caches,
                         [[maybe_unused]] int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t k = 0; k < count; k++) {
        const int64_t height = d[k], width = p[k];
        const float share = m ? mix[k] : 0.0f;
        double square = 0.0;
        for (int64_t i = 0; i < height; i++) {
            const float *x = r[k] + i * r_pitch[k], *y = m ? m[k] + i * m_pitch[k] : x, *scale = columns[k];
            float* to = out[k] + i * out_pitch[k];
            const float row = rows[k][i];
            const bool streaming = past_caches && (reinterpret_cast<uintptr_t>(to) % (4 * LANES)) == 0;
            for (int64_t first = 0; first < width; first += BLOCK_COLUMNS) {
                const int64_t stop = std::min(first + BLOCK_COLUMNS, width);
                Vec sum = {};
                float rest = 0.0f;
                auto one = [&](int64_t j) {
                    Vec value = load(x + j);
                    if (m) value += share * (load(y + j) - value);
                    value = (row * value) * load(scale + j);
                    sum += value * value;
                    return value;
                };
                int64_t j = first;
                if (streaming)
                    for (; j + LANES <= stop; j += LANES) stream(to + j, one(j));
                else
                    for (; j + LANES <= stop; j += LANES) store(to + j, one(j));
                for (; j < stop; j++) {
                    const float mixed = m ? x[j] + share * (y[j] - x[j]) : x[j];
                    to[j] = (row * mixed) * scale[j];
                    rest += to[j] * to[j];
                }
                square += total(sum) + rest;
            }
        }
        squares[k] = (float)(square / width);
        if (past_caches) fence();
    }
}

}  // extern "C"
