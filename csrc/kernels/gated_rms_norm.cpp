// Gate, then RMSNorm over groups of channels: u = y·silu(z), out = weight · u / sqrt(mean over the group of u² + eps).
//
// A decode step has one row of 4,096 channels in 8 groups: 40 KB, and an exponential per channel, which takes longer than
// the memory. So u is kept, in L1, between the pass that sums its squares and the pass that scales it; of a group that
// is wider than that, u is computed again, to the same bits. Every (row, group) is by itself.
//
// Order of additions: four chains of vectors, as in rms_norm.cpp: channel c of a group belongs to chain c mod 64.
#include "../kernels.h"
#include "../pool.h"
#include "../simd.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {
namespace {

constexpr size_t chains = 4, block = chains * lanes;
constexpr size_t kept_channels = 4096;
constexpr size_t small_call = 1 << 13;     // channels of a call that is not worth a second thread
constexpr size_t block_channels = 1 << 11;  // handed out to a thread at a time

template <typename Y, typename Z>
f32x16 gated(const Y* y, const Z* z, size_t c, size_t n) {
    return mul(load_some(y + c, n), silu(load_some(z + c, n)));
}

template <typename Y, typename Z, typename W>
void normalize(const Y* y, const Z* z, const W* weight, Z* out, size_t cols, float eps) {
    float kept[kept_channels];
    f32x16 acc[chains] = {fill(0.0f), fill(0.0f), fill(0.0f), fill(0.0f)};
    for (size_t c = 0; c < cols; c += block) {
        for (size_t k = 0, at = c; k < chains && at < cols; ++k, at += lanes) {
            const f32x16 u = gated(y, z, at, cols - at);
            if (at + lanes <= kept_channels) store(kept + at, u);
            acc[k] = fma(u, u, acc[k]);
        }
    }
    const float mean = sum(add(add(acc[0], acc[1]), add(acc[2], acc[3]))) / static_cast<float>(cols);
    const f32x16 scale = fill(1.0f / __builtin_sqrtf(mean + eps));
    for (size_t c = 0; c < cols; c += lanes) {
        const f32x16 u = c + lanes <= kept_channels ? load(kept + c) : gated(y, z, c, cols - c);
        const f32x16 scaled = mul(load_some(weight + c, cols - c), mul(u, scale));
        if (cols - c >= lanes) store(out + c, scaled);
        else store(out + c, scaled, cols - c);
    }
}

struct Problem {
    const void *y, *z, *weight;
    void* out;
    size_t rows, groups, cols, y_row_stride, z_row_stride;
    float eps;
};

template <typename Y, typename Z, typename W>
void run(const Problem& p) {
    const size_t items = p.rows * p.groups, width = p.groups * p.cols;
    const size_t grain = p.rows * width < small_call ? items : p.cols < block_channels ? block_channels / p.cols : 1;
    parallel(items, grain, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
            const size_t row = i / p.groups, first = i % p.groups * p.cols;
            normalize(static_cast<const Y*>(p.y) + row * p.y_row_stride + first,
                      static_cast<const Z*>(p.z) + row * p.z_row_stride + first, static_cast<const W*>(p.weight) + first,
                      static_cast<Z*>(p.out) + row * width + first, p.cols, p.eps);
        }
    });
}

template <typename Y, typename Z>
void with_weight(const Problem& p, Dtype weight_dtype) {
    if (weight_dtype == Dtype::float32) run<Y, Z, float>(p);
    else run<Y, Z, bf16>(p);
}
template <typename Y>
void with_gate(const Problem& p, Dtype z_dtype, Dtype weight_dtype) {
    if (z_dtype == Dtype::float32) with_weight<Y, float>(p, weight_dtype);
    else with_weight<Y, bf16>(p, weight_dtype);
}

}  // namespace

void gated_rms_norm(const void* y, const void* z, const void* weight, void* out, size_t rows, size_t groups, size_t cols,
                    size_t y_row_stride, size_t z_row_stride, float eps, Dtype y_dtype, Dtype z_dtype,
                    Dtype weight_dtype) noexcept {
    const Problem p{y, z, weight, out, rows, groups, cols, y_row_stride, z_row_stride, eps};
    if (y_dtype == Dtype::float32) with_gate<float>(p, z_dtype, weight_dtype);
    else with_gate<bf16>(p, z_dtype, weight_dtype);
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
