// The router: logits of all experts, then each token's choice.
//
// The weights are read once, expert by expert, by whichever thread takes the expert: 0.7 MB of bfloat16 for 128 experts
// of 2688, so the bound is memory. A dot product runs in 64 chains (four f32x16, as in rms_norm.cpp): column c belongs
// to chain c mod 64, whatever the number of tokens. Up to four tokens meet a row of weights while it is in registers;
// the next four find it in L1. Of many tokens, 64 at a time meet all experts: they stay in the second cache.
//
// A choice is a function of one token's E logits alone. Everything is a small array on the stack.
#include "../kernels.h"
#include "../pool.h"
#include "../simd.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {
namespace {

constexpr size_t chains = 4, block = chains * lanes;
constexpr size_t experts_per_block = 4;  // handed out at once: about 20 KB of weights
constexpr size_t tokens_per_block = 64;
constexpr size_t prefetch_bytes = 4096;  // ahead of use, into the next experts' rows

// out[r] = dot product of x's row r with w, for `rows` rows.
template <size_t rows, typename X, typename W>
void dot(const X* x, size_t x_stride, const W* w, size_t D, float* out, size_t out_stride) {
    f32x16 acc[rows][chains];
    for (size_t r = 0; r < rows; ++r)
        for (size_t k = 0; k < chains; ++k) acc[r][k] = fill(0.0f);
    size_t d = 0;
    for (; d + block <= D; d += block) {
        for (size_t line = 0; line < block * sizeof(W); line += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(w + d) + prefetch_bytes + line);
        for (size_t k = 0; k < chains; ++k) {
            const f32x16 v = load(w + d + k * lanes);
            for (size_t r = 0; r < rows; ++r) acc[r][k] = fma(load(x + r * x_stride + d + k * lanes), v, acc[r][k]);
        }
    }
    for (size_t k = 0; k < chains && d < D; ++k, d += lanes) {
        const size_t n = D - d;
        const f32x16 v = n >= lanes ? load(w + d) : load(w + d, n);
        for (size_t r = 0; r < rows; ++r) {
            const X* from = x + r * x_stride + d;
            acc[r][k] = fma(n >= lanes ? load(from) : load(from, n), v, acc[r][k]);
        }
    }
    for (size_t r = 0; r < rows; ++r)
        out[r * out_stride] = sum(add(add(acc[r][0], acc[r][1]), add(acc[r][2], acc[r][3])));
}

template <typename X, typename W>
void all_logits(const X* x, size_t x_stride, size_t M, const W* w, size_t E, size_t D, float* logits) {
    const size_t blocks = (M + tokens_per_block - 1) / tokens_per_block;
    parallel(blocks * E, experts_per_block, [=](size_t begin, size_t end) {
        for (size_t item = begin; item < end; ++item) {
            const size_t e = item % E, first = item / E * tokens_per_block;
            const size_t last = M - first < tokens_per_block ? M : first + tokens_per_block;
            const W* row = w + e * D;
            size_t m = first;
            for (; m + 4 <= last; m += 4) dot<4>(x + m * x_stride, x_stride, row, D, logits + m * E + e, E);
            for (; m + 2 <= last; m += 2) dot<2>(x + m * x_stride, x_stride, row, D, logits + m * E + e, E);
            if (m < last) dot<1>(x + m * x_stride, x_stride, row, D, logits + m * E + e, E);
        }
    });
}

// NaN before every number, as PyTorch sorts.
inline bool before(float a, float b) { return a > b || (a != a && b == b); }

// The positions of the `count` best scores, best first; of equal scores the lower position comes first.
void best(const float* score, size_t n, size_t count, size_t* chosen) {
    size_t found = 0;
    for (size_t i = 0; i < n; ++i) {
        if (found == count && !before(score[i], score[chosen[count - 1]])) continue;
        size_t at = found < count ? found++ : count - 1;
        for (; at > 0 && before(score[i], score[chosen[at - 1]]); --at) chosen[at] = chosen[at - 1];
        chosen[at] = i;
    }
}

// Scores of experts outside the topk_group best groups become -inf; a group's score is the sum of its two best.
void limit_to_groups(float* score, size_t E, size_t n_group, size_t topk_group) {
    const size_t size = E / n_group;
    float group_score[router_experts];
    bool allowed[router_experts] = {};
    size_t chosen[router_experts];
    for (size_t g = 0; g < n_group; ++g) {
        const float* own = score + g * size;
        best(own, size, size < 2 ? 1 : 2, chosen);
        group_score[g] = size < 2 ? own[chosen[0]] : own[chosen[0]] + own[chosen[1]];
    }
    best(group_score, n_group, topk_group, chosen);
    for (size_t i = 0; i < topk_group; ++i) allowed[chosen[i]] = true;
    for (size_t e = 0; e < E; ++e)
        if (!allowed[e / size]) score[e] = -__builtin_inff();
}

struct Rule {
    size_t top_k, n_group, topk_group;
    bool norm;
    float scaling;
};

void choose(const float* logits, const float* bias, size_t E, const Rule& rule, int64_t* experts, float* weights) {
    float s[router_experts], score[router_experts];
    for (size_t e = 0; e < E; e += lanes) {
        if (E - e >= lanes) store(s + e, sigmoid(load(logits + e)));
        else store(s + e, sigmoid(load(logits + e, E - e)), E - e);
    }
    for (size_t e = 0; e < E; ++e) score[e] = s[e] + bias[e];
    if (rule.topk_group < rule.n_group) limit_to_groups(score, E, rule.n_group, rule.topk_group);
    size_t ranked[router_experts];
    best(score, E, rule.top_k, ranked);

    bool chosen[router_experts] = {};
    for (size_t i = 0; i < rule.top_k; ++i) chosen[ranked[i]] = true;
    float total = 0.0f;
    for (size_t e = 0, i = 0; e < E; ++e) {  // in ascending order of ids, which is also the order of the sum
        if (!chosen[e]) continue;
        experts[i] = static_cast<int64_t>(e);
        weights[i++] = s[e];
        total += s[e];
    }
    total += 1e-20f;
    for (size_t i = 0; i < rule.top_k; ++i) {
        if (rule.norm) weights[i] /= total;
        weights[i] *= rule.scaling;
    }
}

template <typename X>
void with_weight(const void* x, size_t x_stride, size_t M, const void* w, Dtype w_dtype, size_t E, size_t D,
                 float* logits) {
    const X* in = static_cast<const X*>(x);
    if (w_dtype == Dtype::float32) all_logits(in, x_stride, M, static_cast<const float*>(w), E, D, logits);
    else all_logits(in, x_stride, M, static_cast<const bf16*>(w), E, D, logits);
}

}  // namespace

void router(const void* x, Dtype x_dtype, size_t x_stride, size_t M, const void* weight, Dtype weight_dtype, size_t E,
            size_t D, const float* bias, size_t top_k, size_t n_group, size_t topk_group, bool norm, float scaling,
            int64_t* experts, float* weights, float* logits) noexcept {
    about_to_read(weight, E * D * (weight_dtype == Dtype::float32 ? 4 : 2));
    if (x_dtype == Dtype::float32) with_weight<float>(x, x_stride, M, weight, weight_dtype, E, D, logits);
    else with_weight<bf16>(x, x_stride, M, weight, weight_dtype, E, D, logits);
    const Rule rule{top_k, n_group, topk_group, norm, scaling};
    parallel(M, 1, [&](size_t begin, size_t end) {
        for (size_t m = begin; m < end; ++m)
            choose(logits + m * E, bias, E, rule, experts + m * top_k, weights + m * top_k);
    });
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
