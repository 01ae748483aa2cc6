// Every kernel of one level against plain loops in double: for machines without Python, such as an emulated one. The level
// is the generic one, or NEMOTRON_H_LEVEL's, with which all kernels must have been compiled too; for the matrix units:
//
//     g++ -std=c++17 -O2 -ffp-contract=off -fno-math-errno -static -pthread -DNEMOTRON_H_LEVEL=amx -mavx2 -mfma -mf16c
//         -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512bf16 -mamx-tile -mamx-int8 -mamx-bf16 -Icsrc
//         -o kernels_amx tests/native/kernels_test.cpp csrc/{pool,scratch,memory}.cpp csrc/kernels/*.cpp
//
// or, without them, -DNEMOTRON_H_EMULATE_TILES in place of the three -mamx options. With an argument only the cases whose
// function has that name run.
//
// Prints one line per case: its name, its error relative to the 2-norm of what is expected, and a digest of the
// output's bits, which must depend on neither the machine (tools/aarch64.sh compares two) nor the level. Exits with 1 if an
// error is too large.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#if defined(__AMX_TILE__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "formats.h"
#include "kernels.h"
#include "pool.h"

#if !defined(NEMOTRON_H_LEVEL)
#define NEMOTRON_H_LEVEL generic
#endif

using namespace nemotron_h;

const size_t nemotron_h::read_ahead = 4096;  // isa.cpp has it, which wants the kernels of every level

namespace {

#define OF_LEVEL(type, name) nemotron_h::NEMOTRON_H_LEVEL::name,
const Kernels kernels = {NEMOTRON_H_KERNELS(OF_LEVEL)};
int failures = 0;

// Memory at 64 bytes, as the kernels want their scratch, filled with what no result may be (NaN).
template <typename T>
struct Array {
    explicit Array(size_t n) : size(n), bytes((n * sizeof(T) + 63) / 64 * 64) {
        memory.reset(static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64)));
        std::memset(memory.get(), 0xff, bytes);
    }
    T* get() { return memory.get(); }
    T& operator[](size_t i) { return memory.get()[i]; }
    size_t size, bytes;
    struct Free {
        void operator()(T* p) const { std::free(p); }
    };
    std::unique_ptr<T, Free> memory;
};

using Doubles = std::vector<double>;

// A matrix as a kernel takes it, in either dtype, and its exact values.
struct Values {
    Values(size_t n, Dtype dtype, float scale = 1.0f, float middle = 0.0f)
        : dtype(dtype), floats(n), halves(n), exact(n) {
        for (size_t i = 0; i < n; ++i) {
            state = state * 6364136223846793005ull + 1442695040888963407ull;
            float a = middle + scale * (static_cast<float>(state >> 40) / 8388608.0f - 1.0f);
            uint32_t bits;
            std::memcpy(&bits, &a, 4);
            if (dtype == Dtype::bfloat16) bits &= 0xffff0000u, std::memcpy(&a, &bits, 4);
            floats[i] = a, halves[i] = static_cast<uint16_t>(bits >> 16), exact[i] = a;
        }
    }
    const void* data() { return dtype == Dtype::float32 ? static_cast<void*>(floats.get()) : halves.get(); }
    const float* f() { return floats.get(); }
    double operator[](size_t i) const { return exact[i]; }
    Dtype dtype;
    Array<float> floats;
    Array<uint16_t> halves;
    Doubles exact;
    static uint64_t state;
};
uint64_t Values::state = 1;

struct Output {
    Output(size_t n, Dtype dtype) : dtype(dtype), floats(n), halves(n) {}
    void* data() { return dtype == Dtype::float32 ? static_cast<void*>(floats.get()) : halves.get(); }
    double operator[](size_t i) {
        if (dtype == Dtype::float32) return floats[i];
        const uint32_t bits = static_cast<uint32_t>(halves[i]) << 16;
        float a;
        std::memcpy(&a, &bits, 4);
        return a;
    }
    Dtype dtype;
    Array<float> floats;
    Array<uint16_t> halves;
};

uint64_t digest(const void* p, size_t bytes) {
    uint64_t hash = 14695981039346656037ull;
    for (size_t i = 0; i < bytes; ++i) hash = (hash ^ static_cast<const uint8_t*>(p)[i]) * 1099511628211ull;
    return hash;
}

// The cases run twice, on one thread and on three: the second time only the bits are looked at.
std::vector<uint64_t> first_run;
size_t seen_again = 0;
bool again = false;

void report(const std::string& name, double error, double allowed, uint64_t bits) {
    const bool same = !again || first_run[seen_again++] == bits;
    const bool ok = error <= allowed && same;  // false for NaN
    failures += !ok;
    if (again && ok) return;
    first_run.push_back(bits);
    std::printf("%-32s %.1e %s %016llx\n", name.c_str(), error,
                ok ? "ok" : again ? "WRONG on three threads" : "WRONG", static_cast<unsigned long long>(bits));
}

void compare(const std::string& name, Output& out, const Doubles& expected, double allowed) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
        difference += (out[i] - expected[i]) * (out[i] - expected[i]);
        norm += expected[i] * expected[i];
    }
    const size_t bytes = expected.size() * (out.dtype == Dtype::float32 ? 4 : 2);
    report(name, std::sqrt(difference / norm), allowed, digest(out.data(), bytes));
}

const Dtype dtypes[] = {Dtype::float32, Dtype::bfloat16};
std::string with(const char* name, Dtype dtype) { return name + std::string(dtype == Dtype::float32 ? " float32" : " bfloat16"); }
double rounding(Dtype dtype) { return dtype == Dtype::float32 ? 2e-6 : 4e-3; }
double silu(double x) { return x / (1 + std::exp(-x)); }

void rms_norm() {
    for (Dtype dtype : dtypes) {
        const size_t rows = 3, cols = 1003;
        Values x(rows * cols, dtype), weight(cols, dtype);
        Output out(rows * cols, dtype);
        kernels.rms_norm(x.data(), weight.data(), out.data(), rows, cols, cols, 1e-5f, dtype, dtype);
        Doubles expected;
        for (size_t r = 0; r < rows; ++r) {
            double sum = 0;
            for (size_t c = 0; c < cols; ++c) sum += x[r * cols + c] * x[r * cols + c];
            for (size_t c = 0; c < cols; ++c)
                expected.push_back(weight[c] * x[r * cols + c] / std::sqrt(sum / cols + 1e-5));
        }
        compare(with("rms_norm", dtype), out, expected, rounding(dtype));
    }
}

void add() {
    for (Dtype dtype : dtypes) {
        const size_t count = 70001;
        Values x(count, dtype), y(count, dtype, 3);
        Output out(count, dtype);
        kernels.add(x.data(), y.data(), out.data(), count, dtype, dtype);
        Doubles expected;
        for (size_t i = 0; i < count; ++i) expected.push_back(x[i] + y[i]);
        compare(with("add", dtype), out, expected, rounding(dtype));
    }
}

void with_room() {
    const size_t batch = 2, heads = 3, T = 5, slots = 8, size = 7, row = heads * size;
    Values x(batch * T * row, Dtype::float32);
    Output out(batch * heads * slots * size, Dtype::float32);
    kernels.with_room(x.data(), out.data(), batch, heads, T, slots, 4 * size, 4 * T * row, 4 * size, 4 * row);
    Doubles expected;
    for (size_t i = 0; i < batch * heads * slots * size; ++i) {
        const size_t c = i % size, t = i / size % slots, h = i / size / slots % heads, b = i / size / slots / heads;
        expected.push_back(t < T ? x[(b * T + t) * row + h * size + c] : 0);
    }
    compare("with_room", out, expected, 0);
}

void gated_rms_norm() {
    for (Dtype dtype : dtypes) {
        const size_t rows = 2, groups = 3, cols = 77, width = groups * cols;
        Values y(rows * width, Dtype::float32), z(rows * width, dtype, 4), weight(width, dtype);
        Output out(rows * width, dtype);
        kernels.gated_rms_norm(y.data(), z.data(), weight.data(), out.data(), rows, groups, cols, width, width, 1e-5f,
                               Dtype::float32, dtype, dtype);
        Doubles expected;
        for (size_t g = 0; g < rows * groups; ++g) {
            double sum = 0;
            for (size_t i = g * cols; i < (g + 1) * cols; ++i) sum += std::pow(y[i] * silu(z[i]), 2);
            for (size_t i = g * cols; i < (g + 1) * cols; ++i)
                expected.push_back(weight[i % width] * y[i] * silu(z[i]) / std::sqrt(sum / cols + 1e-5));
        }
        compare(with("gated_rms_norm", dtype), out, expected, rounding(dtype));
    }
}

void time_step() {
    const size_t T = 3, H = 37;
    Values dt(T * H, Dtype::bfloat16, 6), bias(H, Dtype::float32, 2);
    Output out(T * H, Dtype::float32);
    kernels.time_step(dt.data(), bias.data(), out.floats.get(), 1, T, H, T * H, H, 0.001f, 5.0f, dt.dtype, bias.dtype);
    Doubles expected;
    for (size_t i = 0; i < T * H; ++i)
        expected.push_back(std::min(std::max(std::log1p(std::exp(dt[i] + bias[i % H])), 0.001), 5.0));
    compare("time_step", out, expected, 2e-6);
}

void causal_conv1d() {
    for (Dtype dtype : dtypes) {
        const size_t T = 3, C = 45, K = 4;
        Values x(T * C, dtype), weight(C * K, dtype), bias(C, dtype), window(C * (K - 1), dtype);
        Output out(T * C, dtype), left((K - 1) * C, dtype);
        kernels.causal_conv1d(x.data(), weight.data(), bias.data(), window.data(), nullptr, nullptr, out.data(),
                              left.data(), 1, T, C, K, T * C, C, C * (K - 1), K - 1, 1, dtype, dtype, dtype);
        auto input = [&](size_t at, size_t c) { return at < K - 1 ? window[c * (K - 1) + at] : x[(at - K + 1) * C + c]; };
        Doubles expected, kept;
        for (size_t t = 0; t < T; ++t)
            for (size_t c = 0; c < C; ++c) {
                double sum = bias[c];
                for (size_t k = 0; k < K; ++k) sum += weight[c * K + k] * input(t + k, c);
                expected.push_back(silu(sum));
            }
        for (size_t k = 0; k < K - 1; ++k)
            for (size_t c = 0; c < C; ++c) kept.push_back(input(T + k, c));
        compare(with("causal_conv1d", dtype), out, expected, rounding(dtype));
        compare(with("causal_conv1d window", dtype), left, kept, 0);
    }
}

void ssd_step() {
    for (Dtype dtype : dtypes) {
        const size_t T = 2, H = 4, P = 20, G = 2, N = 24;
        Values x(T * H * P, dtype), B(T * G * N, dtype), C(T * G * N, dtype), D(H, dtype), state(H * P * N, Dtype::float32);
        Values dt(T * H, Dtype::float32, 0.4f, 0.5f), A(H, Dtype::float32, 0.4f, -1.0f);
        Output y(T * H * P, Dtype::float32), left(H * P * N, Dtype::float32);
        kernels.ssd_step(x.data(), dt.f(), A.f(), B.data(), C.data(), D.data(), state.data(), left.data(),
                         y.floats.get(), 1, T, H, P, G, N, T * H * P, H * P, P, T * G * N, G * N, N, T * G * N, G * N, N,
                         dtype, dtype, Dtype::float32, Dtype::float32);
        Doubles h = state.exact, expected(T * H * P);
        for (size_t t = 0; t < T; ++t)
            for (size_t i = 0; i < H * P; ++i) {
                const size_t head = i / P, group = (t * G + head / (H / G)) * N;
                const double in = x[t * H * P + i], step = dt[t * H + head];
                expected[t * H * P + i] = D[head] * in;
                for (size_t n = 0; n < N; ++n) {
                    h[i * N + n] = std::exp(step * A[head]) * h[i * N + n] + step * in * B[group + n];
                    expected[t * H * P + i] += h[i * N + n] * C[group + n];
                }
            }
        compare(with("ssd_step", dtype), y, expected, 2e-6);
        compare(with("ssd_step state", dtype), left, h, 2e-6);
    }
}

void ssd_scan() {
    for (Dtype dtype : dtypes) {
        const size_t T = 150, H = 4, P = 20, G = 2, N = 24, boundary = 70;
        Values x(T * H * P, dtype), B(T * G * N, dtype), C(T * G * N, dtype), D(H, dtype), state(H * P * N, Dtype::float32);
        Values dt(T * H, Dtype::float32, 0.05f, 0.06f), A(H, Dtype::float32, 0.4f, -1.0f);
        Output y(T * H * P, Dtype::float32), left(H * P * N, Dtype::float32);
        std::vector<int64_t> documents(T, 3);
        std::fill(documents.begin() + boundary, documents.end(), 5);
        kernels.ssd_scan(x.data(), dt.f(), A.f(), B.data(), C.data(), D.data(), state.data(), documents.data(),
                         left.floats.get(), y.floats.get(), 1, T, H, P, G, N, T * H * P, H * P, P, T * G * N, G * N, N,
                         T * G * N, G * N, N, dtype, dtype, Dtype::float32);
        Doubles h = state.exact, expected(T * H * P);
        for (size_t t = 0; t < T; ++t) {
            if (t == boundary) h.assign(h.size(), 0.0);
            for (size_t i = 0; i < H * P; ++i) {
                const size_t head = i / P, group = (t * G + head / (H / G)) * N;
                const double in = x[t * H * P + i], step = dt[t * H + head];
                expected[t * H * P + i] = D[head] * in;
                for (size_t n = 0; n < N; ++n) {
                    h[i * N + n] = std::exp(step * A[head]) * h[i * N + n] + step * in * B[group + n];
                    expected[t * H * P + i] += h[i * N + n] * C[group + n];
                }
            }
        }
        compare(with("ssd_scan", dtype), y, expected, 2e-6);
        compare(with("ssd_scan state", dtype), left, h, 2e-6);
    }
}

void attention() {
    for (Dtype dtype : dtypes) {
        const size_t T = 2, heads = 2, repeats = 3, S = 300, d = 40, Q = heads * repeats;
        AttentionShape shape{1, T, heads, repeats, S, d, 0, 0, 0, 1, {heads * S * d, S * d, d}, {heads * S * d, S * d, d}, {}, {}, {}};
        Values q(T * Q * d, dtype, 3), k(heads * S * d, dtype), v(heads * S * d, dtype);
        Output out(T * Q * d, dtype);
        Array<float> scratch(heads * 2 * T * repeats * (48 + 2) + 16);
        kernels.attention(&shape, q.data(), dtype, k.data(), v.data(), dtype, nullptr, nullptr, nullptr, scratch.get(),
                          out.data());
        Output many(T * Q * d, dtype);
        Array<float> slot(attention_prefill_scratch(d, 1));
        kernels.attention_prefill(&shape, q.data(), dtype, k.data(), v.data(), dtype, nullptr, nullptr, nullptr,
                                  slot.get(), many.data());
        Doubles expected(T * Q * d);
        for (size_t i = 0; i < T * Q; ++i) {
            const size_t head = i % Q / repeats;
            double total = 0;
            for (size_t s = 0; s < S; ++s) {
                double score = 0;
                for (size_t c = 0; c < d; ++c) score += q[i * d + c] * k[(head * S + s) * d + c];
                score = std::exp(score / std::sqrt(static_cast<double>(d)));
                total += score;
                for (size_t c = 0; c < d; ++c) expected[i * d + c] += score * v[(head * S + s) * d + c];
            }
            for (size_t c = 0; c < d; ++c) expected[i * d + c] /= total;
        }
        compare(with("attention", dtype), out, expected, dtype == Dtype::float32 ? 5e-6 : 4e-3);
        compare(with("attention_prefill", dtype), many, expected, dtype == Dtype::float32 ? 5e-6 : 4e-3);
    }
}

void router() {
    const size_t M = 3, E = 40, D = 133, k = 5;
    Values x(M * D, Dtype::bfloat16), weight(E * D, Dtype::bfloat16), bias(E, Dtype::float32, 0.2f);
    Output logits(M * E, Dtype::float32), weights(M * k, Dtype::float32);
    Array<int64_t> experts(M * k);
    kernels.router(x.data(), x.dtype, D, M, weight.data(), weight.dtype, E, D, bias.f(), k, 1, 1, true, 2.5f, experts.get(),
                   weights.floats.get(), logits.floats.get());
    Doubles expected, shares;
    double wrong = 0;
    for (size_t m = 0; m < M; ++m) {
        Doubles score;
        for (size_t e = 0; e < E; ++e) {
            double sum = 0;
            for (size_t i = 0; i < D; ++i) sum += x[m * D + i] * weight[e * D + i];
            expected.push_back(sum);
            score.push_back(1 / (1 + std::exp(-sum)) + bias[e]);
        }
        std::vector<size_t> order(E);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return score[a] > score[b]; });
        std::sort(order.begin(), order.begin() + k);
        double total = 0;
        for (size_t i = 0; i < k; ++i) total += score[order[i]] - bias[order[i]];
        for (size_t i = 0; i < k; ++i) {
            wrong += experts[m * k + i] != static_cast<int64_t>(order[i]);
            shares.push_back(2.5 * (score[order[i]] - bias[order[i]]) / total);
        }
    }
    compare("router logits", logits, expected, 2e-6);
    compare("router weights", weights, shares, 2e-6);
    report("router experts", wrong, 0, digest(experts.get(), experts.size * sizeof(int64_t)));
}

void sample() {
    const size_t V = 5000;
    Values logits(V, Dtype::float32, 9);
    Array<float> scratch(sample_scratch(V));
    std::vector<size_t> order(V);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return logits[a] > logits[b]; });
    double wrong = kernels.sample(logits.f(), V, 0, 0, 1, 0, 0, scratch.get()) != static_cast<int64_t>(order[0]);
    std::vector<int64_t> found;
    for (size_t top_k : {size_t{0}, size_t{70}})
        for (double top_p : {1.0, 0.8})
            for (double u : {0.0, 0.3, 0.77}) {
                found.push_back(kernels.sample(logits.f(), V, 0.9f, top_k, top_p, 0, u, scratch.get()));
                Doubles weight(V);
                double total = 0, before = 0, kept = 0, sum = 0;
                for (size_t i = 0; i < (top_k ? top_k : V); ++i) {
                    weight[order[i]] = std::exp((logits[order[i]] - logits[order[0]]) / static_cast<double>(0.9f));
                    total += weight[order[i]];
                }
                for (size_t i = 0; i < V; ++i) {
                    const double own = weight[order[i]];
                    if (before >= top_p * total) weight[order[i]] = 0;
                    before += own, kept += weight[order[i]];
                }
                size_t token = 0;
                while ((sum += weight[token]) <= u * kept) ++token;
                wrong += found.back() != static_cast<int64_t>(token);
            }
    report("sample", wrong, 0, digest(found.data(), found.size() * sizeof(int64_t)));
}

// The product with weights that were packed from w: within the error of so many bits, which plain loops need not copy.
struct Packing {
    const char* name;
    Format format;
    double error;
};
const Packing packings[] = {{"bf16", Format::packed_bf16, 0.004}, {"int8", Format::int8, 0.02}, {"int4", Format::int4, 0.15}};

Doubles product(const Values& x, const Values& w, size_t M, size_t N, size_t K) {
    Doubles out;
    for (size_t m = 0; m < M; ++m)
        for (size_t n = 0; n < N; ++n) {
            double sum = 0;
            for (size_t k = 0; k < K; ++k) sum += x[m * K + k] * w[n * K + k];
            out.push_back(sum);
        }
    return out;
}

void linear() {
    const size_t M = 3, N = 35, K = 200;
    for (Dtype dtype : dtypes) {
        const Format format = dtype == Dtype::float32 ? Format::float32 : Format::bfloat16;
        Values x(M * K, dtype), w(N * K, dtype), bias(N, dtype);
        Output out(M * N, dtype);
        Array<uint8_t> scratch(linear_scratch(M, K, format, Arithmetic::integer));
        kernels.linear(x.data(), dtype, K, M, w.data(), format, K, N, K, 0, ScaleType::float16, Arithmetic::integer,
                       bias.data(), dtype, Activation::relu2, out.data(), dtype, N, scratch.get());
        Doubles expected = product(x, w, M, N, K);
        for (size_t i = 0; i < M * N; ++i) expected[i] = std::pow(std::max(expected[i] + bias[i % N], 0.0), 2);
        compare(with("linear", dtype), out, expected, 3 * rounding(dtype));  // of the product, squared, and of the square
    }
    for (const Packing& p : packings)
        for (Arithmetic arithmetic : {Arithmetic::integer, Arithmetic::floating}) {
            Values x(M * K, Dtype::float32), w(N * K, Dtype::float32);
            Output out(M * N, Dtype::float32);
            Array<uint8_t> panels((N + 15) / 16 * panel_bytes(p.format, K, 0));
            Array<uint8_t> scratch(linear_scratch(M, K, p.format, arithmetic));
            const bool finite = kernels.pack(w.f(), N, K, p.format, panels.get());
            report(std::string("pack ") + p.name, finite ? 0 : 1, 0, digest(panels.get(), panels.size));
            kernels.linear(x.data(), x.dtype, K, M, panels.get(), p.format, 0, N, K, 0, ScaleType::float16, arithmetic,
                           nullptr, Dtype::float32, Activation::none, out.data(), Dtype::float32, N, scratch.get());
            const char* kind = arithmetic == Arithmetic::integer ? " integer" : " floating";
            compare(std::string("linear ") + p.name + kind, out, product(x, w, M, N, K), p.error);
        }
}

// A foreign matrix: random integers, scales and minimums where formats.h has them, and what they stand for.
struct Grouped {
    Grouped(Format format, size_t group, size_t N, size_t K) : panels((N + 15) / 16 * panel_bytes(format, K, group)) {
        const PanelLayout layout(format, K, group);
        const bool four = format == Format::grouped4 || format == Format::grouped4_min;
        const bool has_min = format == Format::grouped4_min || format == Format::grouped8_min;
        const size_t cols = layout.chunks * chunk_cols;
        Values noise(panels.size, Dtype::float32);
        for (size_t i = 0; i < panels.size; ++i) panels[i] = static_cast<uint8_t>(static_cast<int>(noise[i] * 127.0));
        w.resize(N * K);
        for (size_t p = 0; p < panels.size / layout.bytes; ++p) {
            uint8_t* panel = panels.get() + p * layout.bytes;
            for (size_t g = 0; g < (cols + group - 1) / group; ++g)
                for (size_t r = 0; r < 16; ++r) {
                    const size_t at = g * 16 + r;
                    const uint16_t code = static_cast<uint16_t>(0x3c00 + (at * 37 + p * 11) % 1024);  // 1 to 2 as bfloat16, by 2^-7
                    const uint32_t word = static_cast<uint32_t>(code) << 16;
                    float scale, low = has_min ? 0.001f * static_cast<float>(at % 7) : 0.0f;
                    std::memcpy(panel + 2 * at, &code, 2);
                    std::memcpy(&scale, &word, 4);
                    if (has_min) std::memcpy(panel + layout.minimums + 4 * at, &low, 4);
                    for (size_t k = g * group; k < std::min(K, (g + 1) * group); ++k) {
                        const size_t n = p * 16 + r, row = four ? k / 8 : k / 4;
                        const uint8_t byte = panel[layout.values + row * 64 + r * 4 + k % 4];
                        const int nibble = k % 8 < 4 ? byte & 15 : byte >> 4;
                        const int q = !four ? static_cast<int8_t>(byte) : has_min ? nibble : nibble - 8;
                        if (n < N) w[n * K + k] = static_cast<double>(scale) * q + low;
                    }
                }
        }
    }
    Array<uint8_t> panels;
    Doubles w;
};

// A prompt: rows around the tiles of every level, several slabs of columns, an odd panel, every format. Few rows of the
// same weights must have the same bits, which the digest of each tells.
void many_rows() {
    const size_t N = 45, K = 1080;
    const auto run = [&](const std::string& name, size_t M, const void* w, size_t stride, Format format, size_t group, Dtype dtype,
                         Values& x, const Doubles& expected, double allowed) {
        Output out(M * N, Dtype::float32), one(M * N, Dtype::float32);
        Array<uint8_t> scratch(linear_scratch(M, K, format, Arithmetic::integer));
        const auto call = [&](size_t first, size_t rows, Output& to) {
            kernels.linear(static_cast<const char*>(x.data()) + first * K * (dtype == Dtype::float32 ? 4 : 2), dtype, K, rows, w,
                           format, stride, N, K, group, ScaleType::bfloat16, Arithmetic::integer, nullptr, Dtype::float32,
                           Activation::none, to.floats.get() + first * N, Dtype::float32, N, scratch.get());
        };
        call(0, M, out);
        for (size_t m = 0; m < M; ++m) call(m, 1, one);
        const bool same = std::memcmp(out.data(), one.data(), M * N * 4) == 0;
        compare(name + " x " + std::to_string(M), out, Doubles(expected.begin(), expected.begin() + M * N), same ? allowed : -1);
    };
    for (Dtype dtype : dtypes) {
        const size_t most = 75;
        Values x(most * K, dtype), w(N * K, Dtype::float32), plain(N * K, dtype);
        const Format format = dtype == Dtype::float32 ? Format::float32 : Format::bfloat16;
        const double rounded = dtype == Dtype::float32 ? 3e-6 : 4e-3;  // sums are rounded to x's dtype
        const size_t rows[] = {9, 23, 33, most};
        const Doubles exact = product(x, plain, most, N, K), near = product(x, w, most, N, K);
        for (size_t M : rows) run(with("many plain", dtype), M, plain.data(), K, format, 0, dtype, x, exact, rounded);
        for (const Packing& p : packings) {
            Array<uint8_t> panels((N + 15) / 16 * panel_bytes(p.format, K, 0));
            kernels.pack(w.f(), N, K, p.format, panels.get());
            for (size_t M : rows)
                run(with((std::string("many ") + p.name).c_str(), dtype), M, panels.get(), 0, p.format, 0, dtype, x, near, p.error + rounded);
        }
        for (Format f : {Format::grouped8, Format::grouped4, Format::grouped8_min, Format::grouped4_min})
            for (size_t group : {size_t{32}, size_t{64}, size_t{128}}) {
                Grouped g(f, group, N, K);
                Doubles expected;
                for (size_t m = 0; m < most; ++m)
                    for (size_t n = 0; n < N; ++n) {
                        double sum = 0;
                        for (size_t k = 0; k < K; ++k) sum += x[m * K + k] * g.w[n * K + k];
                        expected.push_back(sum);
                    }
                const std::string name = "many grouped " + std::to_string(static_cast<int>(f)) + " of " + std::to_string(group);
                for (size_t M : rows) run(with(name.c_str(), dtype), M, g.panels.get(), 0, f, group, dtype, x, expected, 0.02);
            }
    }
}

void experts() {
    const size_t M = 3, k = 2, E = 4, L = 70, F = 50;
    for (Dtype dtype : dtypes) {
        const Format format = dtype == Dtype::float32 ? Format::float32 : Format::bfloat16;
        const size_t wide = dtype == Dtype::float32 ? 4 : 2;
        Values x(M * L, dtype), up(E * F * L, dtype), down(E * L * F, dtype), weights(M * k, Dtype::float32, 0.4f, 0.5f);
        const int64_t ids[M * k] = {0, 3, 1, 3, 0, 1};
        Output out(M * L, dtype);
        Array<uint8_t> scratch(experts_scratch(M, k, E, L, F, format, Arithmetic::integer));
        const bool legal = kernels.experts(x.data(), dtype, L, M, k, E, ids, weights.f(), up.data(), F * L * wide,
                                           down.data(), L * F * wide, format, 0, ScaleType::float16, Arithmetic::integer,
                                           L, F, nullptr, nullptr, out.data(), dtype, scratch.get());
        Doubles expected(M * L);
        for (size_t i = 0; i < M * k; ++i) {
            const size_t m = i / k, e = static_cast<size_t>(ids[i]);
            Doubles inner(F);
            for (size_t f = 0; f < F; ++f) {
                for (size_t l = 0; l < L; ++l) inner[f] += up[(e * F + f) * L + l] * x[m * L + l];
                inner[f] = std::pow(std::max(inner[f], 0.0), 2);
            }
            for (size_t l = 0; l < L; ++l)
                for (size_t f = 0; f < F; ++f) expected[m * L + l] += weights[i] * down[(e * L + l) * F + f] * inner[f];
        }
        compare(with("experts", dtype), out, expected, legal ? 2 * rounding(dtype) : -1);
    }
}

// Packed experts against the linear kernel on the same panels, which `linear` has held against plain loops. Of many tokens
// all visit the last expert, half of them each of two others, and one the first.
void packed_experts(size_t M, Dtype dtype) {
    const size_t k = 2, E = 4, L = 70, F = 50;
    std::vector<int64_t> ids;
    for (size_t m = 0; m < M; ++m) ids.push_back(m == 1 ? 0 : m % 2 == 0 ? 2 : 1), ids.push_back(3);
    for (const Packing& p : packings)
        for (Arithmetic arithmetic : {Arithmetic::integer, Arithmetic::floating}) {
            Values x(M * L, dtype), up(E * F * L, Dtype::float32), down(E * L * F, Dtype::float32);
            Values weights(M * k, Dtype::float32, 0.4f, 0.5f);
            const size_t up_bytes = (F + 15) / 16 * panel_bytes(p.format, L, 0);
            const size_t down_bytes = (L + 15) / 16 * panel_bytes(p.format, F, 0);
            Array<uint8_t> ups(E * up_bytes), downs(E * down_bytes);
            for (size_t e = 0; e < E; ++e) {
                kernels.pack(up.f() + e * F * L, F, L, p.format, ups.get() + e * up_bytes);
                kernels.pack(down.f() + e * L * F, L, F, p.format, downs.get() + e * down_bytes);
            }
            Output out(M * L, Dtype::float32);
            Array<uint8_t> scratch(experts_scratch(M, k, E, L, F, p.format, arithmetic));
            const bool legal = kernels.experts(x.data(), x.dtype, L, M, k, E, ids.data(), weights.f(), ups.get(), up_bytes,
                                               downs.get(), down_bytes, p.format, 0, ScaleType::float16, arithmetic, L, F,
                                               nullptr, nullptr, out.data(), out.dtype, scratch.get());
            const auto product = [&](const float* in, const Array<uint8_t>& panels, size_t from, size_t N, size_t K,
                                     Activation activation, float* to) {
                Array<uint8_t> work(linear_scratch(1, K, p.format, arithmetic));
                kernels.linear(in, Dtype::float32, K, 1, panels.memory.get() + from, p.format, 0, N, K, 0,
                               ScaleType::float16, arithmetic, nullptr, Dtype::float32, activation, to, Dtype::float32, N,
                               work.get());
            };
            Doubles expected(M * L);
            for (size_t i = 0; i < M * k; ++i) {
                const size_t m = i / k, e = static_cast<size_t>(ids[i]);
                Array<float> inner(F), outer(L);
                product(x.floats.get() + m * L, ups, e * up_bytes, F, L, Activation::relu2, inner.get());
                product(inner.get(), downs, e * down_bytes, L, F, Activation::none, outer.get());
                for (size_t l = 0; l < L; ++l) expected[m * L + l] += weights[i] * outer[l];
            }
            const char* kind = arithmetic == Arithmetic::integer ? " integer" : " floating";
            const std::string name = std::string("experts ") + p.name + kind + (M > 3 ? " many" : "");
            compare(with(name.c_str(), dtype), out, expected, legal ? 2e-6 : -1);
        }
}
void packed_experts() {
    for (Dtype dtype : dtypes) packed_experts(3, dtype), packed_experts(43, dtype);
}

// The fused step gives the bits of its parts, which have been held against plain loops above.
void mamba_step() {
    for (Dtype dtype : dtypes) {
        const size_t T = 2, H = 4, P = 20, G = 2, N = 24, K = 4, inner = H * P, C = inner + 2 * G * N, row = inner + C + H;
        const size_t wide = dtype == Dtype::float32 ? 4 : 2;
        Values in(T * row, dtype), conv(C * K, dtype), conv_bias(C, dtype), dt_bias(H, dtype), D(H, dtype);
        Values norm(inner, dtype), window(C * (K - 1), dtype), state(H * P * N, Dtype::float32);
        Values A(H, Dtype::float32, 0.4f, -1.0f);
        Output out(T * inner, dtype), left(H * P * N, Dtype::float32), kept((K - 1) * C, dtype);
        Output inputs(T * C, dtype), convolved(T * C, dtype);
        Array<float> steps(T * H);
        Array<uint8_t> scratch(4 * T * (C + H + inner) + 256);
        kernels.mamba_step(in.data(), conv.data(), conv_bias.data(), dt_bias.data(), A.f(), D.data(), norm.data(),
                           window.data(), state.data(), left.data(), out.data(), kept.data(), 1, T, H, P, G, N, K,
                           C * (K - 1), K - 1, 1, 0.001f, 5.0f, 1e-5f, dtype, dtype, dtype, dtype, dtype, dtype,
                           Dtype::float32, Dtype::float32, inputs.data(), convolved.data(), steps.get(), scratch.get());

        const auto at = [&](const void* p, size_t elements) { return static_cast<const char*>(p) + elements * wide; };
        Output xBC(T * C, dtype), window_after(kept.halves.size, dtype), after(H * P * N, Dtype::float32);
        Output expected(T * inner, dtype);
        Array<float> dt(T * H), y(T * inner);
        kernels.causal_conv1d(at(in.data(), inner), conv.data(), conv_bias.data(), window.data(), nullptr, nullptr,
                              xBC.data(), window_after.data(), 1, T, C, K, T * row, row, C * (K - 1), K - 1, 1, dtype,
                              dtype, dtype);
        kernels.time_step(at(in.data(), inner + C), dt_bias.data(), dt.get(), 1, T, H, T * row, row, 0.001f, 5.0f, dtype,
                          dtype);
        kernels.ssd_step(xBC.data(), dt.get(), A.f(), at(xBC.data(), inner), at(xBC.data(), inner + G * N), D.data(),
                         state.data(), after.data(), y.get(), 1, T, H, P, G, N, T * C, C, P, T * C, C, N, T * C, C, N,
                         dtype, dtype, Dtype::float32, Dtype::float32);
        kernels.gated_rms_norm(y.get(), in.data(), norm.data(), expected.data(), T, G, inner / G, inner, row, 1e-5f,
                               Dtype::float32, dtype, dtype);
        const auto values = [](Output& o) {
            Doubles found;
            for (size_t i = 0; i < o.floats.size; ++i) found.push_back(o[i]);
            return found;
        };
        compare(with("mamba_step", dtype), out, values(expected), 0);
        compare(with("mamba_step window", dtype), kept, values(window_after), 0);
        compare(with("mamba_step state", dtype), left, values(after), 0);
        compare(with("mamba_step convolved", dtype), convolved, values(xBC), 0);
    }
}

#define TEST(name) {#name, name}
const struct {
    const char* name;
    void (*run)();
} tests[] = {TEST(rms_norm), TEST(add), TEST(with_room), TEST(gated_rms_norm), TEST(time_step), TEST(causal_conv1d),
             TEST(ssd_step), TEST(ssd_scan), TEST(attention), TEST(router), TEST(sample), TEST(linear), TEST(many_rows), TEST(experts),
             TEST(packed_experts), TEST(mamba_step)};

// Of the matrix units: Linux grants them on request (isa.cpp); elsewhere the system may just have them on.
void tiles() {
#if defined(__AMX_TILE__) && defined(__linux__)
    if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) std::printf("the system does not grant the tile state\n"), std::fflush(stdout);
#endif
#if defined(__AMX_TILE__) || defined(NEMOTRON_H_EMULATE_TILES)
    report("tiles", nemotron_h::amx::tiles_work() ? 0 : 1, 0, 0);
#endif
}

}  // namespace

int main(int count, char** arguments) {
    for (size_t threads : {size_t{1}, size_t{3}}) {
        set_threads(threads);
        again = threads != 1;
        Values::state = 1;
        tiles();
        for (const auto& test : tests)
            if (count < 2 || std::string(arguments[1]) == test.name) test.run();
    }
    std::printf("%d wrong\n", failures);
    return failures != 0;
}
