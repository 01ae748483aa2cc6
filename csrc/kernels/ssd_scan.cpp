// The recurrence of Mamba-2 for many tokens, h = exp(dt·A)·h + (dt·x) ⊗ B, y = h·C + D·x, in chunks (arXiv 2405.21060,
// section 6).
//
// Token by token every state would be read and written once per token. A chunk of 64 tokens touches it twice, and all
// the work becomes four matrix products of which registers reuse every operand:
//
//     S = B·Cᵀ                      [s, q]   how token q reads what token s wrote; once for all heads of a group
//     y = (h·Cᵀ)∘reach + xᵀ·M       [p, q]   from the state that arrives, and from the chunk's own tokens, with
//                                            M[s, q] = S[s, q]·dt[s]·exp(Σ dt·A over (s, q]), zero where s > q
//     h = keep·h + (x∘left)ᵀ·B      [p, n]   the state that leaves
//
// The lanes of a vector are tokens q in the first two products and states n in the third, so that the state is read and
// written as it lies in memory, [P, N], and only C is transposed (once per group) and y (on its way out).
//
// The bound is arithmetic: 2·N·P multiply-adds per token and head are unavoidable, S and M·x add 32·P + 32·N/(H/G). A
// longer chunk adds to those, a shorter one saves nothing: 64 is the best. It is not the model's chunk_size, which
// changes rounding only. Chunks lie at multiples of 64 from the start of the call, or of the document in packed rows:
// a prompt cut at a multiple of 64, or a document by itself, has the same bits.
//
// Decays. exp(Σ over (s, q]) comes from a running sum in double, kept as two floats: a difference of two such sums is
// as exact as the sum of the terms between them. Off the diagonal tiles of 16 tokens it is a product of two factors
// that are at most 1, from s to the tile's first token and from there to q: 16 exponentials for a tile instead of 256,
// and nothing overflows. The decay of a whole chunk multiplies the state again and again, so it enters as two floats,
// as in ssd_step.cpp.
//
// Order of additions, for each output one chain of fused multiply-adds: over n, then over s from the chunk's first
// token to its own, for y; over s, then once onto the state, for h. Nothing depends on the tokens behind, on the other
// rows and heads of the call, or on the width of the block in registers.
#include "../kernels.h"
#include "../pool.h"
#include "../simd.h"
#include "../simd_rows.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {
namespace {

constexpr size_t Q = 64, tiles = Q / lanes;  // tokens of a chunk
constexpr size_t max_states = 256;           // native.py refuses more
constexpr size_t piece = 64;                 // rows of a state at a time
constexpr size_t small_call = 1 << 18;       // elements of states times tokens that are not worth a second thread
constexpr size_t rows = 4;                   // of the product's block in registers
#if defined(__AVX512F__)
constexpr size_t most = 4;  // vectors of a row of that block: 16 of the 32 registers
#else
constexpr size_t most = 1;  // a vector is two registers of AVX2's 16
#endif

// x, B or C: [batch, T, parts, size] with contiguous `size` elements.
struct Input {
    const void* data;
    size_t batch, token, part;  // strides in elements

    template <typename T>
    const T* row(size_t b, size_t t, size_t p) const {
        return static_cast<const T*>(data) + b * batch + t * token + p * part;
    }
};

struct Problem {
    Input x, B, C;
    const float *dt, *A;
    const void *D, *state;
    Dtype D_dtype, state_dtype;
    const int64_t* documents;
    float *out_state, *y;
    size_t batch, T, H, P, G, N;
};

// What one thread works on, some 200 KB: in its L2, and operand by operand in L1.
struct alignas(64) Chunk {
    float C[max_states][Q];                          // transposed
    float B[Q * max_states];                         // rows at `width`
    float S[Q][Q], M[Q][Q];                          // rows s
    float x[Q][piece];
    float y[piece][Q];
    float high[Q], low[Q];                           // running sum of dt·A in two floats
    float dt[Q], reach[Q], left[Q];
    float keep, rest;                                // decay of the chunk
    size_t b, first, length, steps, width;           // steps: tokens up to the last that is not padding (dt 0)
};

// n elements as floats, zeros behind them up to the next full vector.
template <typename T>
void widen(const T* from, size_t n, float* to) {
    size_t i = 0;
    for (; i + lanes <= n; i += lanes) store(to + i, load(from + i));
    if (i < n) store(to + i, load(from + i, n - i));
}

float number(const void* p, Dtype dtype, size_t at) {
    if (dtype == Dtype::float32) return static_cast<const float*>(p)[at];
    float a[lanes];
    store(a, load(static_cast<const bf16*>(p) + at, 1));
    return a[0];
}

// --- The product -----------------------------------------------------------------------------------------------------

// sums[r, v] += Σ_k a[r, k] · b[k, v] for R rows and the vectors from `from` to V: a is broadcast element by element, b
// read vector by vector. 4 × 4 vectors cost 8 loads for 16 multiply-adds, half of what the load units can do.
template <size_t R, size_t V, size_t from = 0>
inline void accumulate(f32x16 (&sums)[R][V], const float* a, size_t a_row, size_t a_k, const float* b, size_t b_k,
                       size_t K) {
    for (size_t k = 0; k < K; ++k, a += a_k, b += b_k) {
        f32x16 right[V];
        for (size_t v = from; v < V; ++v) right[v] = load(b + v * lanes);
        for (size_t r = 0; r < R; ++r) {
            const f32x16 left = fill(a[r * a_row]);
            for (size_t v = from; v < V; ++v) sums[r][v] = fma(left, right[v], sums[r][v]);
        }
    }
}

template <size_t R, size_t V>
inline void clear(f32x16 (&sums)[R][V]) {
    for (size_t r = 0; r < R; ++r)
        for (size_t v = 0; v < V; ++v) sums[r][v] = fill(0.0f);
}

// The same over the triangle s <= q, tile by tile: tokens s of tile `from` reach vectors from that tile on. b starts at
// token s = 0 and at the vector's q; `below`: tokens in front of this block's first q; K: all tokens.
template <size_t R, size_t V, size_t from = 0>
inline void accumulate_triangle(f32x16 (&sums)[R][V], const float* a, size_t a_k, const float* b, size_t below,
                                size_t K) {
    const size_t begin = below + from * lanes;
    if (begin >= K) return;
    const size_t count = K - begin < lanes ? K - begin : lanes;
    accumulate<R, V, from>(sums, a + begin * a_k, 1, a_k, b + begin * Q, Q, count);
    if constexpr (from + 1 < V) accumulate_triangle<R, V, from + 1>(sums, a, a_k, b, below, K);
}

// body<R, V>(i, j) for blocks of R <= 4 rows from i on and V <= `most` vectors from j on that cover count × vectors.
template <size_t V, typename Body>
inline void for_rows(size_t count, size_t j, const Body& body) {
    size_t i = 0;
    for (; i + rows <= count; i += rows) body.template run<rows, V>(i, j);
    for (; i < count; ++i) body.template run<1, V>(i, j);
}
template <typename Body>
inline void for_blocks(size_t count, size_t vectors, const Body& body) {
    size_t j = 0;
    for (; j + most <= vectors; j += most) for_rows<most>(count, j, body);
    switch (vectors - j) {
        case 0: return;
        case 1: return for_rows<1>(count, j, body);
        case 2: return for_rows<(most > 2 ? 2 : 1)>(count, j, body);
        default: return for_rows<(most > 3 ? 3 : 1)>(count, j, body);
    }
}

// S[s, q] = Σ_n B[s, n]·C[n, q]. Tiles below the diagonal are formed too: nobody reads them.
struct Scores {
    Chunk& c;
    size_t N;
    template <size_t R, size_t V>
    void run(size_t s, size_t tile) const {
        if ((tile + V) * lanes <= s) return;
        f32x16 sums[R][V];
        clear(sums);
        accumulate(sums, c.B + s * c.width, c.width, 1, &c.C[0][tile * lanes], Q, N);
        for (size_t r = 0; r < R; ++r)
            for (size_t v = 0; v < V; ++v) store(&c.S[s + r][(tile + v) * lanes], sums[r][v]);
    }
};

// y[p, q] = reach[q]·Σ_n h[p, n]·C[n, q] + Σ_s x[s, p]·M[s, q].
struct Outputs {
    Chunk& c;
    const float* h;
    size_t N;
    template <size_t R, size_t V>
    void run(size_t p, size_t tile) const {
        f32x16 sums[R][V];
        clear(sums);
        accumulate(sums, h + p * N, N, 1, &c.C[0][tile * lanes], Q, N);
        for (size_t v = 0; v < V; ++v) {
            const f32x16 reach = load(c.reach + (tile + v) * lanes);
            for (size_t r = 0; r < R; ++r) sums[r][v] = mul(reach, sums[r][v]);
        }
        const size_t below = tile * lanes;
        accumulate(sums, &c.x[0][p], 1, piece, &c.M[0][below], Q, below);
        accumulate_triangle(sums, &c.x[0][p], piece, &c.M[0][below], below, c.length);
        for (size_t r = 0; r < R; ++r)
            for (size_t v = 0; v < V; ++v) store(&c.y[p + r][(tile + v) * lanes], sums[r][v]);
    }
};

// h[p, n] = (keep + rest)·h[p, n] + Σ_s x[s, p]·B[s, n], x being x·dt·left by now.
struct Update {
    Chunk& c;
    float* h;
    size_t N;
    template <size_t R, size_t V>
    void run(size_t p, size_t vector) const {
        f32x16 sums[R][V];
        clear(sums);
        accumulate(sums, &c.x[0][p], 1, piece, c.B + vector * lanes, c.width, c.steps);
        const f32x16 keep = fill(c.keep), rest = fill(c.rest);
        for (size_t r = 0; r < R; ++r)
            for (size_t v = 0; v < V; ++v) {
                const size_t n = (vector + v) * lanes;
                float* at = h + (p + r) * N + n;
                const f32x16 before = load_some(at, N - n);
                store_some(at, fma(keep, before, fma(rest, before, sums[r][v])), N - n);
            }
    }
};

// --- Decays ----------------------------------------------------------------------------------------------------------

// exp(Σ dt·A over (from, to]), from the two running sums.
f32x16 decay(f32x16 to_high, f32x16 to_low, f32x16 from_high, f32x16 from_low) {
    return exp_or_zero(add(sub(to_high, from_high), sub(to_low, from_low)));
}

void run_sums(const Problem& p, Chunk& c, size_t h) {
    double sum = 0;
    c.steps = 0;
    for (size_t t = 0; t < Q; ++t) {
        const float dt = t < c.length ? p.dt[(c.b * p.T + c.first + t) * p.H + h] : 0.0f;
        if (dt != 0.0f) c.steps = t + 1;
        sum += static_cast<double>(dt) * p.A[h];
        c.dt[t] = dt;
        c.high[t] = static_cast<float>(sum);
        c.low[t] = static_cast<float>(sum - c.high[t]);
    }
    const f32x16 end_high = fill(c.high[Q - 1]), end_low = fill(c.low[Q - 1]), zero = fill(0.0f);
    for (size_t t = 0; t < Q; t += lanes) {
        const f32x16 high = load(c.high + t), low = load(c.low + t);
        store(c.reach + t, decay(high, low, zero, zero));
        store(c.left + t, mul(load(c.dt + t), decay(end_high, end_low, high, low)));
    }
    const double all = __builtin_exp(sum);
    c.keep = static_cast<float>(all);
    c.rest = static_cast<float>(all - c.keep);
}

// M[s, q] for the tokens q of one tile.
void weigh_tile(Chunk& c, size_t q) {
    const f32x16 high = load(c.high + q), low = load(c.low + q);
    const f32x16 start_high = fill(c.high[q]), start_low = fill(c.low[q]);
    const f32x16 since_start = decay(high, low, start_high, start_low);
    for (size_t first = 0; first < q; first += lanes) {
        float until_start[lanes];
        const f32x16 before = decay(start_high, start_low, load(c.high + first), load(c.low + first));
        store(until_start, mul(load(c.dt + first), before));
        for (size_t i = 0; i < lanes; ++i) {
            const f32x16 weight = mul(fill(until_start[i]), since_start);
            store(&c.M[first + i][q], mul(weight, load(&c.S[first + i][q])));
        }
    }
    for (size_t i = 0; i < lanes && q + i < c.length; ++i) {
        const size_t s = q + i;
        const f32x16 weight = mul(fill(c.dt[s]), decay(high, low, fill(c.high[s]), fill(c.low[s])));
        store(&c.M[s][q], where(0xffffu << i & 0xffffu, mul(weight, load(&c.S[s][q]))));
    }
}

// --- One chunk -------------------------------------------------------------------------------------------------------

template <typename X>
void load_group(const Problem& p, Chunk& c, size_t group) {
    for (size_t t = 0; t < c.length; ++t) widen(p.B.row<X>(c.b, c.first + t, group), p.N, c.B + t * c.width);
    for (size_t q = 0; q < c.length; q += lanes) {
        const X* sixteen[lanes];
        for (size_t i = 0; i < lanes; ++i) {  // behind the last token its row again, for columns that nobody reads
            const size_t t = q + i < c.length ? q + i : c.length - 1;
            sixteen[i] = p.C.row<X>(c.b, c.first + t, group);
        }
        transpose_rows(sixteen, p.N, &c.C[0][q], Q);
    }
    for_blocks(c.length, (c.length + lanes - 1) / lanes, Scores{c, p.N});
}

// y of `count` rows from p on: turned back into rows of tokens, D·x added.
void put_y(const Problem& p, const Chunk& c, size_t h, size_t from, size_t count, float skip) {
    float* out = p.y + ((c.b * p.T + c.first) * p.H + h) * p.P + from;
    const f32x16 D = fill(skip);
    for (size_t q = 0; q < c.length; q += lanes)
        for (size_t i = 0; i < count; i += lanes) {
            f32x16 turned[lanes];
            for (size_t r = 0; r < lanes; ++r) turned[r] = i + r < count ? load(&c.y[i + r][q]) : fill(0.0f);
            transpose(turned);
            for (size_t t = q; t < c.length && t < q + lanes; ++t)
                store_some(out + t * p.H * p.P + i, fma(D, load(&c.x[t][i]), turned[t - q]), count - i);
        }
}

template <typename X>
void scan_head(const Problem& p, Chunk& c, size_t h) {
    const size_t vectors = (c.length + lanes - 1) / lanes;
    run_sums(p, c, h);
    for (size_t q = 0; q < c.length; q += lanes) weigh_tile(c, q);
    const float D = number(p.D, p.D_dtype, h);
    for (size_t from = 0; from < p.P; from += piece) {
        const size_t count = p.P - from < piece ? p.P - from : piece;
        float* state = p.out_state + ((c.b * p.H + h) * p.P + from) * p.N;
        for (size_t t = 0; t < c.length; ++t) widen(p.x.row<X>(c.b, c.first + t, h) + from, count, c.x[t]);
        for_blocks(count, vectors, Outputs{c, state, p.N});
        put_y(p, c, h, from, count, D);
        if (c.steps == 0) continue;  // nothing but padding: the state keeps every bit
        for (size_t t = 0; t < c.steps; ++t)
            for (size_t i = 0; i < count; i += lanes) store(&c.x[t][i], mul(fill(c.left[t]), load(&c.x[t][i])));
        for_blocks(count, c.width / lanes, Update{c, state, p.N});
    }
}

// --- The call --------------------------------------------------------------------------------------------------------

// n elements as floats and nothing behind them; zeros where there is no `from`.
template <typename T>
void copy(const T* from, size_t n, float* to) {
    for (size_t i = 0; i < n; i += lanes) {
        const f32x16 a = from == nullptr ? fill(0.0f) : load_some(from + i, n - i);
        store_some(to + i, a, n - i);
    }
}

void begin_states(const Problem& p, size_t b, size_t first, size_t last, bool fresh) {
    const size_t at = (b * p.H + first) * p.P * p.N, n = (last - first) * p.P * p.N;
    const void* before = fresh ? nullptr : p.state;
    const size_t size = p.state_dtype == Dtype::float32 ? sizeof(float) : sizeof(bf16);
    const void* from = before == nullptr ? nullptr : static_cast<const char*>(before) + at * size;
    if (p.state_dtype == Dtype::float32) copy(static_cast<const float*>(from), n, p.out_state + at);
    else copy(static_cast<const bf16*>(from), n, p.out_state + at);
}

// All chunks of heads [from, to), which share a group, of row b.
template <typename X>
void scan(const Problem& p, Chunk& c, size_t b, size_t from, size_t to) {
    const int64_t* document = p.documents == nullptr ? nullptr : p.documents + b * p.T;
    begin_states(p, b, from, to, false);
    c.b = b, c.width = (p.N + lanes - 1) / lanes * lanes;
    for (c.first = 0; c.first < p.T; c.first += c.length) {
        c.length = p.T - c.first < Q ? p.T - c.first : Q;
        if (document != nullptr) {
            const int64_t* own = document + c.first;
            if (c.first > 0 && own[0] != own[-1]) begin_states(p, b, from, to, true);
            for (size_t t = 1; t < c.length; ++t)
                if (own[t] != own[0]) c.length = t;
        }
        load_group<X>(p, c, from / (p.H / p.G));
        for (size_t h = from; h < to; ++h) scan_head<X>(p, c, h);
    }
}

template <typename X>
void run(const Problem& p) {
    // As many heads at a time as share S, but two blocks for each thread.
    const size_t heads = p.H / p.G, shares = p.batch * p.G;
    size_t parts = (2 * threads() + shares - 1) / shares;
    if (parts > heads) parts = heads;
    const size_t count = shares * parts;
    const size_t grain = p.batch * p.T * p.H * p.P * p.N < small_call ? count : 1;
    parallel(count, grain, [&](size_t begin, size_t end) {
        Chunk chunk;
        for (size_t i = begin; i < end; ++i) {
            const size_t group = i / parts, part = i % parts, first = group % p.G * heads;
            scan<X>(p, chunk, group / p.G, first + heads * part / parts, first + heads * (part + 1) / parts);
        }
    });
}

}  // namespace

void ssd_scan(const void* x, const float* dt, const float* A, const void* B, const void* C, const void* D,
              const void* state, const int64_t* documents, float* out_state, float* y, size_t batch, size_t T, size_t H,
              size_t P, size_t G, size_t N, size_t x_batch, size_t x_token, size_t x_head, size_t B_batch,
              size_t B_token, size_t B_group, size_t C_batch, size_t C_token, size_t C_group, Dtype x_dtype,
              Dtype D_dtype, Dtype state_dtype) noexcept {
    const Problem p{{x, x_batch, x_token, x_head}, {B, B_batch, B_token, B_group}, {C, C_batch, C_token, C_group},
                    dt, A, D, state, D_dtype, state_dtype, documents, out_state, y, batch, T, H, P, G, N};
    if (x_dtype == Dtype::float32) run<float>(p);
    else run<bf16>(p);
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
