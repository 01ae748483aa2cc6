// RMSNorm over rows: numerics.md's formula with one fixed order of additions.
//
// The sum of squares runs in 64 independent chains (four f32x16): one register's chain of fused multiply-adds would wait
// four cycles for each of its steps, four registers keep the unit busy. Column c belongs to chain c mod 64, so the order
// of additions is fixed by the number of columns alone. 64 short chains are also more accurate than one long one.
//
// A row is read twice, the second time from L1 (8192 columns are 32 KB of float32). The bound is memory: 2 · cols ·
// sizeof(x) bytes a row. The rows of a prompt are shared out among the threads; those of a decode step are few and cost less
// than waking one. Subnormal numbers stay what they are on either way, or a row's bits would depend on its company.
#include "../kernels.h"
#include "../pool.h"
#include "../simd.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {
namespace {

constexpr size_t chains = 4, block = chains * lanes;
constexpr size_t grain = 1 << 14, small_call = 1 << 16;  // elements

template <typename X>
float sum_of_squares(const X* x, size_t cols) {
    f32x16 acc[chains] = {fill(0.0f), fill(0.0f), fill(0.0f), fill(0.0f)};
    size_t c = 0;
    for (; c + block <= cols; c += block) {
        for (size_t k = 0; k < chains; ++k) {
            const f32x16 v = load(x + c + k * lanes);
            acc[k] = fma(v, v, acc[k]);
        }
    }
    for (size_t k = 0; k < chains; ++k, c += lanes) {
        if (c >= cols) break;
        const f32x16 v = cols - c >= lanes ? load(x + c) : load(x + c, cols - c);
        acc[k] = fma(v, v, acc[k]);
    }
    return sum(add(add(acc[0], acc[1]), add(acc[2], acc[3])));
}

template <typename X, typename W>
void normalize(const X* x, const W* weight, X* out, size_t rows, size_t cols, size_t x_row_stride, float eps) {
    for (size_t r = 0; r < rows; ++r, x += x_row_stride, out += cols) {
        const float mean = sum_of_squares(x, cols) / static_cast<float>(cols);
        // A division and a square root, both correctly rounded; the reciprocal-root instructions differ between CPUs.
        const f32x16 scale = fill(1.0f / __builtin_sqrtf(mean + eps));
        size_t c = 0;
        for (; c + lanes <= cols; c += lanes) store(out + c, mul(mul(load(weight + c), load(x + c)), scale));
        const size_t rest = cols - c;
        if (rest) store(out + c, mul(mul(load(weight + c, rest), load(x + c, rest)), scale), rest);
    }
}

template <typename X, typename W>
void shared_out(const X* x, const W* weight, X* out, size_t rows, size_t cols, size_t x_row_stride, float eps) {
    if (rows * cols <= small_call) return normalize(x, weight, out, rows, cols, x_row_stride, eps);
    parallel(rows, cols < grain ? grain / cols : 1, [&](size_t begin, size_t end) {
        const KeepSubnormals keep;
        normalize(x + begin * x_row_stride, weight, out + begin * cols, end - begin, cols, x_row_stride, eps);
    });
}

template <typename X>
void with_weight(const void* x, const void* weight, void* out, size_t rows, size_t cols, size_t x_row_stride, float eps,
                 Dtype weight_dtype) {
    const X* in = static_cast<const X*>(x);
    X* to = static_cast<X*>(out);
    if (weight_dtype == Dtype::float32)
        shared_out(in, static_cast<const float*>(weight), to, rows, cols, x_row_stride, eps);
    else
        shared_out(in, static_cast<const bf16*>(weight), to, rows, cols, x_row_stride, eps);
}

}  // namespace

void rms_norm(const void* x, const void* weight, void* out, size_t rows, size_t cols, size_t x_row_stride, float eps,
              Dtype x_dtype, Dtype weight_dtype) noexcept {
    if (x_dtype == Dtype::float32)
        with_weight<float>(x, weight, out, rows, cols, x_row_stride, eps, weight_dtype);
    else
        with_weight<bf16>(x, weight, out, rows, cols, x_row_stride, eps, weight_dtype);
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
