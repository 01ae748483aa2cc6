// Depthwise causal convolution with bias and SiLU, and the window that the next tokens need.
//
// The bound is memory: 4 taps of 6,144 channels are read once, an input and an output per token, and SiLU costs more
// arithmetic than the taps. Sixteen channels are one vector and slide over the tokens in registers: the last K - 1
// inputs, the new one, K fused multiply-adds, SiLU. A row is far longer than a vector, so the work is cut into
// blocks of 64 tokens × 128 channels, which the first vector of channels brings into L1 for the others. For a single
// token the window should lie time-major, one row of channels per step back, as this kernel returns it; any strides are
// read. Weights are stored channel by channel ([C, K], as nn.Conv1d has them), so the K taps of 16 channels are turned
// into K vectors first, once for at least 64 tokens.
//
// Order: acc = bias, then acc = fma(tap k, input k, acc) from the oldest input to the newest. Inputs before the first
// are the window's, or zeros; where a document begins, zeros. Tokens in one call or one by one have the same bits.
#include "../kernels.h"
#include "../pool.h"
#include "../simd.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {
namespace {

constexpr size_t block = 8 * lanes;     // channels handed out to a thread at a time
constexpr size_t token_block = 64;      // and tokens, of one row or of several short ones
constexpr size_t small_call = 1 << 12;  // products of a call that is not worth a second thread

struct Problem {
    const void *x, *weight, *bias, *window;
    const int64_t *lengths, *documents;
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

template <typename X>
f32x16 load_x(const Problem& p, size_t b, size_t t, size_t c, size_t n) {
    return load_some(static_cast<const X*>(p.x) + b * p.x_batch + t * p.x_token + c, n);
}

// Input `at` of the window and the tokens behind it, as one sequence.
template <typename X, size_t K>
f32x16 load_input(const Problem& p, size_t b, size_t c, size_t n, size_t at) {
    return at < K - 1 ? load_window<X>(p, b, c, n, at) : load_x<X>(p, b, at - (K - 1), c, n);
}

// What of n channels from c on all tokens share.
template <size_t K>
struct Weights {
    f32x16 taps[K], bias;
};

// Tokens [begin, end) of row b.
template <typename X, size_t K>
void tokens(const Problem& p, size_t b, size_t begin, size_t end, size_t c, size_t n, const Weights<K>& w) {
    const int64_t* document = p.documents == nullptr ? nullptr : p.documents + b * p.T;
    f32x16 inputs[K];
    for (size_t k = 0; k + 1 < K; ++k) {
        const size_t at = begin + k, token = at < K - 1 ? 0 : at - (K - 1);
        const bool other = document != nullptr && document[token] != document[begin];
        inputs[k] = other ? fill(0.0f) : load_input<X, K>(p, b, c, n, at);
    }
    for (size_t t = begin; t < end; ++t) {
        if (document != nullptr && t > begin && document[t] != document[t - 1])
            for (size_t k = 0; k + 1 < K; ++k) inputs[k] = fill(0.0f);
        inputs[K - 1] = load_x<X>(p, b, t, c, n);
        f32x16 sum = w.bias;
        for (size_t k = 0; k < K; ++k) sum = fma(w.taps[k], inputs[k], sum);
        store_some(static_cast<X*>(p.out) + (b * p.T + t) * p.C + c, silu(sum), n);
        for (size_t k = 0; k + 1 < K; ++k) inputs[k] = inputs[k + 1];
    }
}

// The K - 1 inputs in front of the end of row b.
template <typename X, size_t K>
void keep_window(const Problem& p, size_t b, size_t c, size_t n) {
    const size_t length = p.lengths == nullptr ? p.T : static_cast<size_t>(p.lengths[b]);
    X* to = static_cast<X*>(p.new_window) + b * (K - 1) * p.C + c;
    for (size_t k = 0; k + 1 < K; ++k) store_some(to + k * p.C, load_input<X, K>(p, b, c, n, length + k), n);
}

template <typename X, size_t K>
void run(const Problem& p) {
    // A span is up to 64 tokens of a row; a block of work has as many spans as make 64 tokens.
    const size_t span = p.T < token_block ? p.T : token_block, spans = (p.T + span - 1) / span;
    const size_t together = token_block / span, shares = (p.batch * spans + together - 1) / together;
    const size_t blocks = (p.C + block - 1) / block, count = blocks * shares;
    const size_t grain = p.batch * p.T * p.C < small_call ? count : 1;
    parallel(count, grain, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
            const size_t first = i / blocks * together, from = i % blocks * block;
            const size_t last = first + together < p.batch * spans ? first + together : p.batch * spans;
            for (size_t c = from; c < p.C && c < from + block; c += lanes) {
                const size_t n = p.C - c < lanes ? p.C - c : lanes;
                Weights<K> w;
                load_taps<K>(p, c, n, w.taps);
                w.bias = p.bias == nullptr ? fill(0.0f) : load_any(p.bias, p.bias_dtype, c, n);
                for (size_t j = first; j < last; ++j) {
                    const size_t b = j / spans, t = j % spans * span;
                    tokens<X, K>(p, b, t, t + span < p.T ? t + span : p.T, c, n, w);
                    if (t == 0) keep_window<X, K>(p, b, c, n);
                }
            }
        }
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

void causal_conv1d(const void* x, const void* weight, const void* bias, const void* window, const int64_t* lengths,
                   const int64_t* documents, void* out, void* new_window, size_t batch, size_t T, size_t C, size_t K,
                   size_t x_batch, size_t x_token, size_t window_batch, size_t window_channel, size_t window_step,
                   Dtype x_dtype, Dtype weight_dtype, Dtype bias_dtype) noexcept {
    const Problem p{x, weight, bias, window, lengths, documents, out, new_window, batch, T, C, x_batch, x_token,
                    window_batch, window_channel, window_step, weight_dtype, bias_dtype};
    if (x_dtype == Dtype::float32) with_taps<float>(p, K);
    else with_taps<bf16>(p, K);
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
