// Every kernel of the package, on one screen.
//
// A kernel sees raw pointers and sizes, never a tensor: the Python wrapper (src/nemotron_h/ops/<op>/native.py) has
// checked shapes, dtypes and strides, so a kernel neither validates nor throws. Each file in kernels/ is compiled once
// per level, into the namespace of that level; isa.cpp gathers them in one table of function pointers per level.
//
// Contract of all kernels: the bits of the result depend on the values alone, not on the level, the number of rows or of
// threads, the alignment or the strides. That is what lets one machine check another, and a decode step repeat a prefill.
// Kernels that run on the pool (pool.h) count subnormals as zero, but for those that say they do not.
#pragma once

#include <cstddef>
#include <cstdint>

#include "blocks.h"

namespace nemotron_h {

// Raised whenever a signature below changes; src/nemotron_h/ops/_native.py refuses a library with another number.
constexpr int interface_version = 6;

// Totally ordered: a CPU that has one level has all the lower ones.
enum class Level : int { generic = 0, avx2 = 1, avx512 = 2, amx = 3 };
constexpr int level_count = 4;

enum class Dtype : int { float32 = 0, bfloat16 = 1 };

// Of a weight matrix: plain rows in one of the dtypes, or packed (formats.h).
enum class Format : int {
    float32 = 0, bfloat16 = 1, int8 = 2, int4 = 3, grouped8 = 4, grouped4 = 5, grouped8_min = 6, grouped4_min = 7,
    packed_bf16 = 8,
};
enum class ScaleType : int { float16 = 0, bfloat16 = 1 };  // of grouped formats
enum class Activation : int { none = 0, relu2 = 1 };
enum class Arithmetic : int { integer = 0, floating = 1 };  // of activations that meet packed weights

// out[r, c] = weight[c] · x[r, c] / sqrt(mean over c of x[r, c]² + eps), float32 inside, rounded once to x's dtype.
// x: rows × cols with x_row_stride elements from row to row; weight: cols; out: rows × cols, contiguous. cols ≥ 1.
using RmsNorm = void(const void* x, const void* weight, void* out, size_t rows, size_t cols, size_t x_row_stride,
                     float eps, Dtype x_dtype, Dtype weight_dtype) noexcept;

// out = x + y, each of `count` elements, contiguous, added in float32 and rounded once to x's dtype, which is y's or float32.
// out may be x or y. Subnormal numbers stay what they are.
using Add = void(const void* x, const void* y, void* out, size_t count, Dtype x_dtype, Dtype y_dtype) noexcept;

// out[m, n] = act(Σ_k x[m, k] · w[n, k] + bias[n]), the sum in float32, rounded to x's dtype before and after act, for M rows of x against an N × K matrix.
// Plain weights (x has their dtype): two chains over the even and the odd k of each 32, from zero, then added to the sum,
// which is how the matrix units add. Packed bfloat16 the same, with x in either dtype: the bits are those of plain rows.
// Packed integers: activations become int8 with a scale per 128 k, blocks are summed exactly and enter the sum by one
// fused multiply-add in the order of k; or, Arithmetic::floating, x stays float32.
// w: plain rows at w_stride elements, or panels. x: rows at x_stride elements; out: rows at out_stride. bias may be null.
// scratch: linear_scratch bytes, 64-byte aligned.
using Linear = void(const void* x, Dtype x_dtype, size_t x_stride, size_t M, const void* w, Format format, size_t w_stride,
                    size_t N, size_t K, size_t group, ScaleType scale_type, Arithmetic arithmetic, const void* bias,
                    Dtype bias_dtype, Activation activation, void* out, Dtype out_dtype, size_t out_stride,
                    void* scratch) noexcept;
size_t panel_bytes(Format format, size_t cols, size_t group) noexcept;  // of a packed matrix's 16 rows
size_t linear_scratch(size_t M, size_t K, Format format, Arithmetic arithmetic) noexcept;

// Routed experts: out[m] = Σ over m's k experts e, in the order given, of weight · down_e(relu²(up_e(x[m]))), all sums in
// float32. experts: M × k ids. up: E matrices F × L, down: E matrices L × F, at *_bytes from one to the next (plain rows
// are contiguous). Each expert that any of experts_piece rows chose is read once. Biases (float32, [E, F] and [E, L]) may be
// null. Scratch: experts_scratch bytes, about 8 · k · (L + F) for each row of a piece. Returns false, with nothing written,
// if an id is outside [0, E).
constexpr size_t experts_piece = 512;  // rows that pass through the layer together
using Experts = bool(const void* x, Dtype x_dtype, size_t x_stride, size_t M, size_t k, size_t E, const int64_t* experts,
                     const float* weights, const void* up, size_t up_bytes, const void* down, size_t down_bytes,
                     Format format, size_t group, ScaleType scale_type, Arithmetic arithmetic, size_t L, size_t F,
                     const float* up_bias, const float* down_bias, void* out, Dtype out_dtype, void* scratch) noexcept;
size_t experts_scratch(size_t M, size_t k, size_t E, size_t L, size_t F, Format format, Arithmetic arithmetic) noexcept;

// Packs rows [0, rows) of a float32 matrix (rows × cols, contiguous) into own int8, int4 or bfloat16 panels (to the
// nearest, ties to even); rows beyond the last are zero. Returns false, with the panels in no particular state, if a value
// is not finite, or would not be in bfloat16.
using Pack = bool(const float* w, size_t rows, size_t cols, Format format, void* panels) noexcept;

// The recurrence of Mamba-2 over T ≤ 16 tokens for each of batch × H states of P × N: h = exp(dt·A)·h + (dt·x) ⊗ B,
// y = h·C + D·x, float32 inside. Head i uses group i / (H / G); where dt is 0 the state keeps its bits. x: [batch, T, H, P],
// B and C: [batch, T, G, N], with the strides given and contiguous rows, all of x's dtype. dt: [batch, T, H], A, D: [H],
// y: [batch, T, H, P], contiguous. state: [batch, H, P, N], contiguous, null for zeros; out_state may be state itself.
using SsdStep = void(const void* x, const float* dt, const float* A, const void* B, const void* C, const void* D,
                     const void* state, void* out_state, float* y, size_t batch, size_t T, size_t H, size_t P, size_t G,
                     size_t N, size_t x_batch, size_t x_token, size_t x_head, size_t B_batch, size_t B_token,
                     size_t B_group, size_t C_batch, size_t C_token, size_t C_group, Dtype x_dtype, Dtype D_dtype,
                     Dtype state_dtype, Dtype out_dtype) noexcept;

// The same recurrence over any number of tokens, in chunks; dt is 0 at padding. documents: [batch, T], or null: where
// its number changes, the state starts from zero. N ≤ 256. out_state: [batch, H, P, N], contiguous, not `state`.
using SsdScan = void(const void* x, const float* dt, const float* A, const void* B, const void* C, const void* D,
                     const void* state, const int64_t* documents, float* out_state, float* y, size_t batch, size_t T,
                     size_t H, size_t P, size_t G, size_t N, size_t x_batch, size_t x_token, size_t x_head,
                     size_t B_batch, size_t B_token, size_t B_group, size_t C_batch, size_t C_token, size_t C_group,
                     Dtype x_dtype, Dtype D_dtype, Dtype state_dtype) noexcept;

// out[b, t, c] = silu(bias[c] + Σ_k weight[c, k] · x[b, t - (K-1) + k, c]), float32 inside, for K = 2 to 5. Inputs before the
// first are the window's (element [b, c, k] at the strides given; null: zeros). x: rows of C contiguous channels.
// weight: C × K, contiguous; bias may be null; out: [batch, T, C], contiguous. documents: [batch, T], or null: inputs of
// another number than a token's own count as zero for it. new_window: [batch, K-1, C], contiguous, the last K-1 inputs,
// of the first lengths[b] (null: all). x, window, out and new_window have one dtype.
using CausalConv1d = void(const void* x, const void* weight, const void* bias, const void* window,
                          const int64_t* lengths, const int64_t* documents, void* out, void* new_window, size_t batch,
                          size_t T, size_t C, size_t K, size_t x_batch, size_t x_token, size_t window_batch,
                          size_t window_channel, size_t window_step, Dtype x_dtype, Dtype weight_dtype,
                          Dtype bias_dtype) noexcept;

// u = y·silu(z); out = weight · u / sqrt(mean of u² over its group + eps), float32 inside, rounded once to z's dtype.
// y, z: rows of groups × cols contiguous channels at one distance; weight: groups × cols; out: contiguous.
using GatedRmsNorm = void(const void* y, const void* z, const void* weight, void* out, size_t rows, size_t groups,
                          size_t cols, size_t y_row_stride, size_t z_row_stride, float eps, Dtype y_dtype, Dtype z_dtype,
                          Dtype weight_dtype) noexcept;

// out[b, t, h] = clamp(softplus(dt[b, t, h] + bias[h]), low, high), double inside. dt: rows of H contiguous elements.
using TimeStep = void(const void* dt, const void* bias, float* out, size_t batch, size_t T, size_t H, size_t dt_batch,
                      size_t dt_token, float low, float high, Dtype dt_dtype, Dtype bias_dtype) noexcept;

// A[h] = -exp(A_log[h]), double inside.
using DecayRate = void(const void* A_log, float* A, size_t H, Dtype dtype) noexcept;

// causal_conv1d, time_step, ssd_step and gated_rms_norm one after the other, for rows z | x | B | C | dt, contiguous, of
// batch × T tokens. window: any strides, as in CausalConv1d; new_window, out (batch × T × H·P) and the states: contiguous.
// inputs, convolved, steps: all null, or where x | B | C before and behind the convolution (batch × T × (H·P + 2·G·N)) and
// the time steps (batch × T × H) go, for who may want to take tokens back.
// scratch: 4 · batch · T · (H·P + 2·G·N + H + H·P) + 256 bytes, 64-byte aligned.
using MambaStep = void(const void* projected, const void* conv_weight, const void* conv_bias, const void* dt_bias,
                       const float* A, const void* D, const void* norm_weight, const void* window, const void* state,
                       void* out_state, void* out, void* new_window, size_t batch, size_t T, size_t H, size_t P,
                       size_t G, size_t N, size_t K, size_t window_batch, size_t window_channel, size_t window_step,
                       float low, float high, float eps, Dtype dtype, Dtype conv_dtype, Dtype bias_dtype,
                       Dtype dt_bias_dtype, Dtype D_dtype, Dtype norm_dtype, Dtype state_dtype, Dtype out_dtype,
                       void* inputs, void* convolved, float* steps, void* scratch) noexcept;

// Routing of M tokens among E experts (numerics.md, "Router and MoE"): logits[m, e] = Σ_d x[m, d] · weight[e, d] in
// float32, in 64 chains; s = sigmoid(logits); top_k experts of the greatest s + bias, within the topk_group best of
// n_group equal groups; NaN counts as the greatest, of equals the lower id is taken. x: rows at x_stride elements;
// weight: E × D, contiguous. experts, weights: M × top_k, ids ascending; logits: M × E. E <= router_experts, n_group
// divides E.
constexpr size_t router_experts = 512;
using Router = void(const void* x, Dtype x_dtype, size_t x_stride, size_t M, const void* weight, Dtype weight_dtype,
                    size_t E, size_t D, const float* bias, size_t top_k, size_t n_group, size_t topk_group, bool norm,
                    float scaling, int64_t* experts, float* weights, float* logits) noexcept;

// What one call of `attention` works on; strides in elements.
constexpr size_t attention_max_queries = 8, attention_max_size = 256;
struct AttentionShape {
    size_t batch, queries, heads, repeats, keys, size;  // heads: of keys; each serves `repeats` query heads
    size_t causal, past, window;                        // 1: query t sees keys 0..past + t, the last `window` (0: all)
    size_t slots;                                       // of attention_prefill's scratch: threads that can be at work
    size_t k_stride[3], v_stride[3];                    // batch, head, key; channels are contiguous
    size_t k_scale_stride[2], v_scale_stride[2];        // batch, head; keys are contiguous
    size_t visible_stride[3];                           // batch, query, key
};

// out[b, t, h] = Σ_s p[s] · v[b, h / repeats, s], p the softmax over the visible s of q[b, t, h] · k[b, h / repeats, s] /
// sqrt(size), all in float32. q, out: batch × queries × (heads · repeats) × size, contiguous. k_scale, v_scale: null, or
// k and v are int8 and stand for themselves times these. visible: bytes 0 or 1, or null: all that causality leaves. Each
// query must see a key. Both kernels give the same bits: `attention` takes up to 8 queries, and scratch of batch · heads ·
// ⌈keys / 256⌉ · queries · repeats · (size rounded up to 16, + 2) + 16 floats; `attention_prefill` any number, and
// attention_prefill_scratch floats, 64-byte aligned.
using Attention = void(const AttentionShape* shape, const void* q, Dtype q_dtype, const void* k, const void* v,
                       Dtype kv_dtype, const float* k_scale, const float* v_scale, const uint8_t* visible,
                       float* scratch, void* out) noexcept;
constexpr size_t attention_prefill_rows = 128;  // queries times heads that share a tile of keys
constexpr size_t attention_slot(size_t size) {
    const size_t width = (size + 15) / 16 * 16, rows = attention_prefill_rows;
    return rows * (256 + width + 4 + 4 + 2 * width) + 32 * (width + 4) + 256;
}
constexpr size_t attention_prefill_scratch(size_t size, size_t slots) {
    return (slots + 63) / 64 * 16 + slots * attention_slot(size);
}

// out[b, h, s] = x[b, h, s] for the first T of the slots, zero behind; rows of `row` bytes of any kind. x_*: bytes from one
// to the next; out: batch × heads × slots rows, contiguous.
using WithRoom = void(const void* x, void* out, size_t batch, size_t heads, size_t T, size_t slots, size_t row,
                      size_t x_batch, size_t x_head, size_t x_token) noexcept;

// One token from V finite logits, -1 if any is not finite. temperature 0: the greatest. Else the first id at which the
// sum of weights exp((logit - greatest) / temperature) of the tokens that top_k (0: all), top_p and min_p leave exceeds
// u times their total, u in [0, 1). Ties go to the lower ids. scratch: sample_scratch(V) floats.
using Sample = int64_t(const float* logits, size_t V, float temperature, size_t top_k, double top_p, float min_p,
                       double u, float* scratch) noexcept;
constexpr size_t sample_scratch(size_t V) { return 2 * V + 32; }

// x + mixer(norm(x)) of whole blocks, for batch × T or `rows` rows of x, contiguous, T ≤ 16: the kernels of their parts
// one after the other, each rounding to x's dtype as it does by itself. Window, states, new_window and
// what is recorded: as in MambaStep.
// scratch: block_scratch bytes. The router takes D = norm.size; ids that it chooses are always valid.
using MambaBlockStep = void(const MambaBlock* block, const void* x, Dtype dtype, size_t batch, size_t T, const void* window,
                            size_t window_batch, size_t window_channel, size_t window_step, const void* state,
                            Dtype state_dtype, void* out_state, Dtype out_dtype, void* new_window, void* out,
                            void* inputs, void* convolved, float* steps, void* scratch) noexcept;
// Attention's block comes in two: norm and the projections of x, and the projection back added to x. Between them the cache
// takes keys and values, and `attention` runs.
using AttentionInputs = void(const AttentionBlock* block, const void* x, Dtype dtype, size_t rows, void* q, void* k, void* v,
                             void* scratch) noexcept;
using AttentionOutput = void(const AttentionBlock* block, const void* x, const void* heads, Dtype dtype, size_t rows,
                             void* out, void* scratch) noexcept;
using MlpBlockStep = void(const MlpBlock* block, const void* x, Dtype dtype, size_t rows, void* out, void* scratch) noexcept;
using MoeBlockStep = void(const MoeBlock* block, const void* x, Dtype dtype, size_t rows, void* out, void* scratch) noexcept;

// Multiply-adds in registers on every thread of the pool, `rounds` rounds of each: the operations done by all together, a
// multiply-add being two, so that a clock around the call gives the peak of an arithmetic. sinks: threads() floats, at most
// 64, where sums go that nobody needs.
enum class PeakKind : int { float32 = 0, bf16 = 1, int8 = 2 };
constexpr size_t peak_sinks = 64;
using Peak = double(PeakKind kind, size_t rounds, float* sinks) noexcept;

// One line per kernel: its type and its name. The table, the declarations and isa.cpp follow from it.
#define NEMOTRON_H_KERNELS(kernel)            \
    kernel(Add, add)                          \
    kernel(RmsNorm, rms_norm)                 \
    kernel(Router, router)                    \
    kernel(Sample, sample)                    \
    kernel(Linear, linear)                    \
    kernel(Experts, experts)                  \
    kernel(Pack, pack)                        \
    kernel(SsdStep, ssd_step)                 \
    kernel(SsdScan, ssd_scan)                 \
    kernel(CausalConv1d, causal_conv1d)       \
    kernel(GatedRmsNorm, gated_rms_norm)      \
    kernel(TimeStep, time_step)               \
    kernel(DecayRate, decay_rate)             \
    kernel(MambaStep, mamba_step)             \
    kernel(MambaBlockStep, mamba_block)       \
    kernel(AttentionInputs, attention_inputs) \
    kernel(AttentionOutput, attention_output) \
    kernel(MlpBlockStep, mlp_block)           \
    kernel(MoeBlockStep, moe_block)           \
    kernel(Attention, attention)              \
    kernel(Attention, attention_prefill)      \
    kernel(WithRoom, with_room)               \
    kernel(Peak, peak)

struct Kernels {
#define NEMOTRON_H_MEMBER(type, name) type* name;
    NEMOTRON_H_KERNELS(NEMOTRON_H_MEMBER)
};

#define NEMOTRON_H_DECLARE(type, name) type name;
namespace generic {
NEMOTRON_H_KERNELS(NEMOTRON_H_DECLARE)
}
namespace avx2 {
NEMOTRON_H_KERNELS(NEMOTRON_H_DECLARE)
}
namespace avx512 {
NEMOTRON_H_KERNELS(NEMOTRON_H_DECLARE)
}
namespace amx {  // built are those that the matrix units change (CMakeLists.txt); the rest is avx512's
NEMOTRON_H_KERNELS(NEMOTRON_H_DECLARE)
bool tiles_work() noexcept;  // kernels/tile_check.cpp; only for a thread that may use tiles
}

// memory.cpp: whole 2 MiB pages for the memory [p, p + bytes), before it is touched. Bytes of it that may become huge.
size_t advise_huge_pages(void* p, size_t bytes) noexcept;

// isa.cpp
struct CpuFeatures {
    bool avx2, fma, avx512f, avx512bw, avx512dq, avx512vl, avx512_vnni, avx512_bf16;
    bool amx_tile, amx_int8, amx_bf16, amx_permission;  // permission: the kernel has granted this process the tile state
    bool amx_works;                                     // kernels for it are there, and its products are as they must be
};
const CpuFeatures& cpu_features() noexcept;
extern const char* const tile_kernels;  // what was built: "none", "instructions" or, for tests, "emulation"
extern const size_t read_ahead;  // bytes of weights to fetch ahead of the reading
Level highest_level() noexcept;
const Kernels& kernels_of(Level level) noexcept;  // level must not exceed highest_level()

}  // namespace nemotron_h
