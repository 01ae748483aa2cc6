// Depthwise causal convolution of a few tokens with bias and SiLU, and the window that the next tokens need.
//
// A step of a 30B model has 6,144 channels of 4 taps: some 100 KB, a few microseconds. Sixteen channels are one vector
// and slide over the tokens in registers: the last K - 1 inputs, the new one, K fused multiply-adds, SiLU. For that the
// window should lie time-major, one row of channels per step back, as this kernel returns it; any strides are read.
// Weights are stored channel by channel ([C, K], as nn.Conv1d has them), so the K taps of 16 channels are turned into K
// vectors first, once for all rows of the batch.
//
// Order: acc = bias, then acc = fma(tap k, input k, acc) from the oldest input to the newest. Inputs before the first are
// the window's, or zeros. Tokens in one call or one by one have the same bits.
#include "../kernels.h"
#include "../pool.h"
#include "../simd.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {
namespace {

constexpr size_t block = 8 * lanes;     // channels handed out to a thread at a time
constexpr size_t small_call = 1 << 14;  // products of a call that is not worth a second thread

struct Problem {
    const void *x, *weight, *bias, *window;
    void *out, *new_window;
    size_t batch, T, C;
    size_t x_batch, x_token, window_batch, window_channel, window_step;  // strides in elements
    Dtype weight_dtype, bias_dtype;
};


f32x16 load_any(const void* p, Dtype dtype, size_t at, size_t n) {
    return dtype == Dtype::float32 ? load_some(static_cast<const float*>(p) + at, n)
                                   : load_some(static_cast<const bf16*>(p) + at, n);
}

// The K taps of n channels from c on, one vector per tap.
template <size_t K>
void load_taps(const Problem& p, size_t c, size_t n, f32x16* taps) {
    float rows[lanes * K], turned[K][lanes];
    for (size_t i = 0; i < n * K; i += lanes) store(rows + i, load_any(p.weight, p.weight_dtype, c * K + i, n * K - i));
    for (size_t i = n * K; i < lanes * K; ++i) rows[i] = 0.0f;
    for (size_t i = 0; i < lanes; ++i)
        for (size_t k = 0; k < K; ++k) turned[k][i] = rows[i * K + k];
    for (size_t k = 0; k < K; ++k) taps[k] = load(turned[k]);
}

// Window entry `step` (0: the oldest) of n channels from c on.
template <typename X>
f32x16 load_window(const Problem& p, size_t b, size_t c, size_t n, size_t step) {
    if (p.window == nullptr) return fill(0.0f);
    const X* from = static_cast<const X*>(p.window) + b * p.window_batch + c * p.window_channel + step * p.window_step;
    if (p.window_channel == 1) return load_some(from, n);
    X gathered[lanes] = {};
    for (size_t i = 0; i < n; ++i) gathered[i] = from[i * p.window_channel];
    return load(gathered);
}

template <typename X, size_t K>
void channels(const Problem& p, size_t c, size_t n) {
    f32x16 taps[K], inputs[K];
    load_taps<K>(p, c, n, taps);
    const f32x16 bias = p.bias == nullptr ? fill(0.0f) : load_any(p.bias, p.bias_dtype, c, n);
    for (size_t b = 0; b < p.batch; ++b) {
        for (size_t k = 0; k + 1 < K; ++k) inputs[k] = load_window<X>(p, b, c, n, k);
        for (size_t t = 0; t < p.T; ++t) {
            inputs[K - 1] = load_some(static_cast<const X*>(p.x) + b * p.x_batch + t * p.x_token + c, n);
            f32x16 sum = bias;
            for (size_t k = 0; k < K; ++k) sum = fma(taps[k], inputs[k], sum);
            store_some(static_cast<X*>(p.out) + (b * p.T + t) * p.C + c, silu(sum), n);
            for (size_t k = 0; k + 1 < K; ++k) inputs[k] = inputs[k + 1];
        }
        for (size_t k = 0; k + 1 < K; ++k)
            store_some(static_cast<X*>(p.new_window) + (b * (K - 1) + k) * p.C + c, inputs[k], n);
    }
}

template <typename X, size_t K>
void run(const Problem& p) {
    const size_t blocks = (p.C + block - 1) / block;
    const size_t grain = p.batch * p.T * p.C < small_call ? blocks : 1;
    parallel(blocks, grain, [&](size_t begin, size_t end) {
        const size_t last = end * block < p.C ? end * block : p.C;
        for (size_t c = begin * block; c < last; c += lanes) channels<X, K>(p, c, last - c < lanes ? last - c : lanes);
    });
}

template <typename X>
void with_taps(const Problem& p, size_t K) {
    switch (K) {
        case 2: return run<X, 2>(p);
        case 3: return run<X, 3>(p);
        case 4: return run<X, 4>(p);
        case 5: return run<X, 5>(p);
        default: return;  // native.py refuses it
    }
}

}  // namespace

void causal_conv1d(const void* x, const void* weight, const void* bias, const void* window, void* out, void* new_window,
                   size_t batch, size_t T, size_t C, size_t K, size_t x_batch, size_t x_token, size_t window_batch,
                   size_t window_channel, size_t window_step, Dtype x_dtype, Dtype weight_dtype,
                   Dtype bias_dtype) noexcept {
    const Problem p{x, weight, bias, window, out, new_window, batch, T, C, x_batch, x_token, window_batch,
                    window_channel, window_step, weight_dtype, bias_dtype};
    if (x_dtype == Dtype::float32) with_taps<float>(p, K);
    else with_taps<bf16>(p, K);
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
