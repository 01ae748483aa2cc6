// A decode step of a whole block, x + mixer(norm(x)): the kernels of its parts, one after the other.
//
// Nothing is computed here but the additions, so the bits are those of the modules called one by one. What is saved is the
// way from one to the next: between two calls Python touches some hundred cache lines that a step's weights have pushed
// out since the last token, 30 µs a call, while memory stands still. A block of a 30B-A3B model takes 500 µs.
#include "../blocks.h"

#include "../formats.h"
#include "../kernels.h"
#include "../simd.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {
namespace {

// Hands out pieces of the scratch, in the order and with the sizes that scratch.cpp adds up.
struct Pieces {
    char* at;

    template <typename T = void>
    T* take(size_t bytes) {
        char* taken = at;
        at += padded(bytes);
        return static_cast<T*>(static_cast<void*>(taken));
    }
};

size_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

void normed(const BlockNorm& norm, const void* x, Dtype dtype, size_t rows, void* out) {
    rms_norm(x, norm.weight, out, rows, norm.size, norm.size, static_cast<float>(norm.eps), dtype,
             static_cast<Dtype>(norm.dtype));
}

void product(const Matrix& m, const void* x, Dtype dtype, size_t rows, Activation activation, void* out, void* scratch) {
    linear(x, dtype, m.cols, rows, m.data, static_cast<Format>(m.format), m.stride, m.rows, m.cols, m.group,
           static_cast<ScaleType>(m.scale_type), static_cast<Arithmetic>(m.arithmetic), m.bias,
           static_cast<Dtype>(m.bias_dtype), activation, out, dtype, m.rows, scratch);
}

template <typename T>
void add_all(const T* a, const T* b, T* out, size_t n) {
    size_t i = 0;
    for (; i + lanes <= n; i += lanes) store(out + i, add(load(a + i), load(b + i)));
    if (i < n) store(out + i, add(load(a + i, n - i), load(b + i, n - i)), n - i);
}

// out = a + b, rounded once; out may be either.
void add_rows(const void* a, const void* b, void* out, size_t n, Dtype dtype) {
    if (dtype == Dtype::float32)
        add_all(static_cast<const float*>(a), static_cast<const float*>(b), static_cast<float*>(out), n);
    else
        add_all(static_cast<const bf16*>(a), static_cast<const bf16*>(b), static_cast<bf16*>(out), n);
}

}  // namespace

void mamba_block(const MambaBlock* block, const void* x, Dtype dtype, size_t batch, size_t T, const void* window,
                 size_t window_batch, size_t window_channel, size_t window_step, const void* state, Dtype state_dtype,
                 void* out_state, Dtype out_dtype, void* new_window, void* out, void* inputs, void* convolved,
                 float* steps, void* scratch) noexcept {
    const MambaBlock& b = *block;
    const size_t rows = batch * T, size = size_of(dtype), inner = b.H * b.P;
    Pieces pieces{static_cast<char*>(scratch)};
    void* const hidden = pieces.take(rows * b.norm.size * size);
    void* const projected = pieces.take(rows * b.in_proj.rows * size);
    void* const gated = pieces.take(rows * inner * size);
    float* const A = pieces.take<float>(b.H * sizeof(float));

    normed(b.norm, x, dtype, rows, hidden);
    product(b.in_proj, hidden, dtype, rows, Activation::none, projected, pieces.at);
    decay_rate(b.A_log, A, b.H, static_cast<Dtype>(b.A_dtype));
    mamba_step(projected, b.conv_weight, b.conv_bias, b.dt_bias, A, b.D, b.norm_weight, window, state, out_state, gated,
               new_window, batch, T, b.H, b.P, b.G, b.N, b.K, window_batch, window_channel, window_step,
               static_cast<float>(b.low), static_cast<float>(b.high), static_cast<float>(b.eps), dtype,
               static_cast<Dtype>(b.conv_dtype), static_cast<Dtype>(b.bias_dtype), static_cast<Dtype>(b.dt_bias_dtype),
               static_cast<Dtype>(b.D_dtype), static_cast<Dtype>(b.norm_dtype), state_dtype, out_dtype, inputs,
               convolved, steps, pieces.at);
    product(b.out_proj, gated, dtype, rows, Activation::none, hidden, pieces.at);
    add_rows(x, hidden, out, rows * b.norm.size, dtype);
}

void attention_inputs(const AttentionBlock* block, const void* x, Dtype dtype, size_t rows, void* q, void* k, void* v,
                      void* scratch) noexcept {
    const AttentionBlock& b = *block;
    Pieces pieces{static_cast<char*>(scratch)};
    void* const hidden = pieces.take(rows * b.norm.size * size_of(dtype));
    normed(b.norm, x, dtype, rows, hidden);
    product(b.q, hidden, dtype, rows, Activation::none, q, pieces.at);
    product(b.k, hidden, dtype, rows, Activation::none, k, pieces.at);
    product(b.v, hidden, dtype, rows, Activation::none, v, pieces.at);
}

void attention_output(const AttentionBlock* block, const void* x, const void* heads, Dtype dtype, size_t rows, void* out,
                      void* scratch) noexcept {
    const AttentionBlock& b = *block;
    Pieces pieces{static_cast<char*>(scratch)};
    void* const hidden = pieces.take(rows * b.norm.size * size_of(dtype));
    product(b.o, heads, dtype, rows, Activation::none, hidden, pieces.at);
    add_rows(x, hidden, out, rows * b.norm.size, dtype);
}

void mlp_block(const MlpBlock* block, const void* x, Dtype dtype, size_t rows, void* out, void* scratch) noexcept {
    const MlpBlock& b = *block;
    Pieces pieces{static_cast<char*>(scratch)};
    void* const hidden = pieces.take(rows * b.norm.size * size_of(dtype));
    void* const wide = pieces.take(rows * b.up.rows * size_of(dtype));

    normed(b.norm, x, dtype, rows, hidden);
    product(b.up, hidden, dtype, rows, Activation::relu2, wide, pieces.at);
    product(b.down, wide, dtype, rows, Activation::none, hidden, pieces.at);
    add_rows(x, hidden, out, rows * b.norm.size, dtype);
}

void moe_block(const MoeBlock* block, const void* x, Dtype dtype, size_t rows, void* out, void* scratch) noexcept {
    const MoeBlock& b = *block;
    const size_t size = size_of(dtype), D = b.norm.size;
    const bool latent = b.fc1.data != nullptr, shared = b.shared_up.data != nullptr;
    Pieces pieces{static_cast<char*>(scratch)};
    void* const hidden = pieces.take(rows * D * size);
    int64_t* const ids = pieces.take<int64_t>(rows * b.top_k * sizeof(int64_t));
    float* const weights = pieces.take<float>(rows * b.top_k * sizeof(float));
    float* const logits = pieces.take<float>(rows * b.E * sizeof(float));
    void* const narrow = latent ? pieces.take(rows * b.L * size) : hidden;
    void* const routed = pieces.take(rows * D * size);
    void* const sum = latent ? pieces.take(rows * b.L * size) : routed;
    void* const wide = shared ? pieces.take(rows * b.shared_up.rows * size) : nullptr;

    normed(b.norm, x, dtype, rows, hidden);
    router(hidden, dtype, D, rows, b.router_weight, static_cast<Dtype>(b.router_dtype), b.E, D, b.router_bias, b.top_k,
           b.n_group, b.topk_group, b.norm_topk != 0, static_cast<float>(b.scaling), ids, weights, logits);
    if (latent) product(b.fc1, hidden, dtype, rows, Activation::none, narrow, pieces.at);
    experts(narrow, dtype, b.L, rows, b.top_k, b.E, ids, weights, b.up, b.up_bytes, b.down, b.down_bytes,
            static_cast<Format>(b.format), b.group, static_cast<ScaleType>(b.scale_type),
            static_cast<Arithmetic>(b.arithmetic), b.L, b.F, b.up_bias, b.down_bias, sum, dtype, pieces.at);
    if (latent) product(b.fc2, sum, dtype, rows, Activation::none, routed, pieces.at);
    if (shared) {
        product(b.shared_up, hidden, dtype, rows, Activation::relu2, wide, pieces.at);
        product(b.shared_down, wide, dtype, rows, Activation::none, hidden, pieces.at);
        add_rows(routed, hidden, routed, rows * D, dtype);
    }
    add_rows(x, routed, out, rows * D, dtype);
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
