// The recurrence of Mamba-2 for a few tokens: h = exp(dt·A)·h + (dt·x) ⊗ B, y = h·C + D·x.
//
// The bound is memory: a layer of a 30B model has 64 states of 64 × 128 floats, 2 MiB to read and to write, against two
// vectors of B and C. So every state is visited once however many tokens come: a piece of a row sits in registers while
// all tokens pass over it (four tokens then cost hardly more than one), and B, C and x are widened to float32 once per
// head, into L1. Rows are contiguous in N, so y[p] is a sum over lanes at the end of row p. The state is fetched ahead: the
// work of 4 tokens on a row fills the processor's window, which then sees too little of what comes to keep memory busy.
//
// Order of additions: y[t, p] is one chain of fused multiply-adds per lane, over the vectors of the row in order, then
// sum()'s. Nothing depends on the tokens that share the call: T tokens at once have the bits of T calls.
//
// The decay enters as two floats, exp(dt·A) = keep + rest, from a double. As one float it would be off by 3e-8 at every
// step, always in the same direction for the same dt: in a state that remembers 10,000 tokens, 3e-4.
#include "../kernels.h"
#include "../pool.h"
#include "../simd.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {
namespace {

constexpr size_t max_tokens = 16, max_states = 512;  // native.py refuses more
constexpr size_t small_call = 1 << 16;              // state elements that one thread updates in some 10 µs
constexpr size_t block_elements = 1 << 13;          // of a state, handed out to a thread at a time
constexpr size_t cached_bytes = 1 << 20;            // of states that may stay in the cache until the next token
constexpr size_t piece = 4;                         // vectors of a row in registers: half of AVX2's
constexpr size_t ahead = 4096;                      // bytes of a state to fetch ahead of the reading

// x, B, C or D: [batch, T, parts, size] with contiguous `size` elements.
struct Input {
    const void* data;
    Dtype dtype;
    size_t batch, token, part;  // strides in elements

    // Elements [from, from + n) as floats, zeros behind them up to the next full vector.
    void widen(size_t b, size_t t, size_t p, size_t from, size_t n, float* to) const {
        const size_t offset = b * batch + t * token + p * part + from;
        if (dtype == Dtype::float32) copy(static_cast<const float*>(data) + offset, n, to);
        else copy(static_cast<const bf16*>(data) + offset, n, to);
    }

  private:
    template <typename T>
    static void copy(const T* p, size_t n, float* to) {
        size_t i = 0;
        for (; i + lanes <= n; i += lanes) store(to + i, load(p + i));
        if (i < n) store(to + i, load(p + i, n - i));
    }
};

struct Problem {
    Input x, B, C, D;
    const float *dt, *A;
    const void* state;
    void* out_state;
    float* y;
    size_t T, H, P, G, N;
    bool streams;  // the new state goes past the caches
};

// What all rows of one head share, in L1.
struct alignas(64) Head {
    float B[max_tokens][max_states], C[max_tokens][max_states];
    float step[max_tokens], keep[max_tokens], rest[max_tokens];  // dt, and exp(dt·A) in two parts
    float x[max_tokens][lanes], u[max_tokens][lanes], y[max_tokens][lanes];  // of sixteen rows; u = dt·x
    size_t T;
    bool streams;
};

void put(float* p, f32x16 a, bool streams) {
    if (streams) stream(p, a);
    else store(p, a);
}
void put(bf16* p, f32x16 a, bool) { store(p, a); }

// Columns [c, c + n) of row r: all tokens pass while they sit in registers. n fills the vectors, but for a single one.
// A token without a step (padding) leaves every bit of the state alone.
template <size_t vectors, typename In, typename Out>
inline void visit(const In* in, Out* out, size_t c, size_t n, const Head& head, size_t r, f32x16* sums) {
    f32x16 h[vectors];
    for (size_t v = 0; v < vectors; ++v)
        h[v] = in == nullptr ? fill(0.0f) : n < lanes ? load(in + c, n) : load(in + c + v * lanes);
    for (size_t t = 0; t < head.T; ++t) {
        const float *B = head.B[t] + c, *C = head.C[t] + c;
        if (head.step[t] != 0.0f) {
            const f32x16 keep = fill(head.keep[t]), rest = fill(head.rest[t]), u = fill(head.u[t][r]);
            for (size_t v = 0; v < vectors; ++v)
                h[v] = fma(keep, h[v], fma(rest, h[v], mul(u, load(B + v * lanes))));
        }
        f32x16 sum = sums[t];
        for (size_t v = 0; v < vectors; ++v) sum = fma(h[v], load(C + v * lanes), sum);
        sums[t] = sum;
    }
    for (size_t v = 0; v < vectors; ++v) {
        if (n < lanes) store(out + c, h[v], n);
        else put(out + c + v * lanes, h[v], head.streams);
    }
}

template <typename In, typename Out>
void update_row(const In* in, Out* out, size_t N, Head& head, size_t r) {
    if (in != nullptr)
        for (size_t i = 0; i < N * sizeof(In); i += 64) __builtin_prefetch(reinterpret_cast<const char*>(in) + ahead + i);
    f32x16 sums[max_tokens];
    for (size_t t = 0; t < head.T; ++t) sums[t] = fill(0.0f);
    size_t c = 0;
    for (; c + piece * lanes <= N; c += piece * lanes) visit<piece>(in, out, c, piece * lanes, head, r, sums);
    for (; c < N; c += lanes) visit<1>(in, out, c, N - c < lanes ? N - c : lanes, head, r, sums);
    for (size_t t = 0; t < head.T; ++t) head.y[t][r] = sum(sums[t]);
}

void prepare(const Problem& p, size_t b, size_t h, Head& head) {
    const size_t group = h / (p.H / p.G);
    for (size_t t = 0; t < p.T; ++t) {
        p.B.widen(b, t, group, 0, p.N, head.B[t]);
        p.C.widen(b, t, group, 0, p.N, head.C[t]);
        head.step[t] = p.dt[(b * p.T + t) * p.H + h];
        const double decay = __builtin_exp(static_cast<double>(head.step[t]) * p.A[h]);
        head.keep[t] = static_cast<float>(decay);
        head.rest[t] = static_cast<float>(decay - head.keep[t]);
    }
}

template <typename In, typename Out>
void update_head(const Problem& p, size_t b, size_t h, Head& head) {
    prepare(p, b, h, head);
    float D[lanes];
    p.D.widen(0, 0, h, 0, 1, D);
    const size_t first_row = (b * p.H + h) * p.P;
    for (size_t row = 0; row < p.P; row += lanes) {
        const size_t rows = p.P - row < lanes ? p.P - row : lanes;
        for (size_t t = 0; t < p.T; ++t) {
            p.x.widen(b, t, h, row, rows, head.x[t]);
            store(head.u[t], mul(fill(head.step[t]), load(head.x[t])));
        }
        for (size_t r = 0; r < rows; ++r) {
            const size_t at = (first_row + row + r) * p.N;
            const In* in = p.state == nullptr ? nullptr : static_cast<const In*>(p.state) + at;
            update_row(in, static_cast<Out*>(p.out_state) + at, p.N, head, r);
        }
        for (size_t t = 0; t < p.T; ++t) {
            const f32x16 y = fma(fill(D[0]), load(head.x[t]), load(head.y[t]));
            store_some(p.y + ((b * p.T + t) * p.H + h) * p.P + row, y, rows);
        }
    }
}

template <typename In, typename Out>
void run(const Problem& p, size_t batch) {
    const size_t heads = batch * p.H, elements = p.P * p.N;
    const size_t grain = heads * elements < small_call ? heads : elements < block_elements ? block_elements / elements : 1;
    parallel(heads, grain, [&](size_t begin, size_t end) {
        Head head;
        head.T = p.T, head.streams = p.streams;
        for (size_t i = begin; i < end; ++i) update_head<In, Out>(p, i / p.H, i % p.H, head);
        if (p.streams) stream_end();
    });
}

}  // namespace

void ssd_step(const void* x, const float* dt, const float* A, const void* B, const void* C, const void* D,
              const void* state, void* out_state, float* y, size_t batch, size_t T, size_t H, size_t P, size_t G, size_t N,
              size_t x_batch, size_t x_token, size_t x_head, size_t B_batch, size_t B_token, size_t B_group,
              size_t C_batch, size_t C_token, size_t C_group, Dtype x_dtype, Dtype D_dtype, Dtype state_dtype,
              Dtype out_dtype) noexcept {
    // A store to memory that is not in the cache first reads it, unless it goes past the cache in whole lines. Written in
    // place the state has just been read; written elsewhere it would cost half as much again.
    const bool whole_lines = N % lanes == 0 && reinterpret_cast<uintptr_t>(out_state) % 64 == 0;
    const bool streams = out_state != state && whole_lines && batch * H * P * N * sizeof(float) > cached_bytes;
    const Problem p{{x, x_dtype, x_batch, x_token, x_head}, {B, x_dtype, B_batch, B_token, B_group},
                    {C, x_dtype, C_batch, C_token, C_group}, {D, D_dtype, 0, 0, 1}, dt, A, state, out_state, y, T, H, P, G, N, streams};
    if (state_dtype == Dtype::float32) {
        if (out_dtype == Dtype::float32) run<float, float>(p, batch);
        else run<float, bf16>(p, batch);
    } else {
        if (out_dtype == Dtype::float32) run<bf16, float>(p, batch);
        else run<bf16, bf16>(p, batch);
    }
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
