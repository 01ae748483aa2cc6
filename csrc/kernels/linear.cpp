// A linear layer. For a few rows the weights stream past once, every thread taking panels of 16 output rows (product.h,
// few_rows.h); many are multiplied block by block, all panels for each (many_rows.h, tile_rows.h).
#include "tile_rows.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {
namespace {

inline f32x16 with_bias(f32x16 y, const void* bias, Dtype dtype, size_t n, size_t count) {
    if (bias == nullptr) return y;
    if (dtype == Dtype::float32) return add(y, load_up_to(static_cast<const float*>(bias) + n, count));
    return add(y, load_up_to(static_cast<const bf16*>(bias) + n, count));
}

// y as x's dtype has it: what follows then gives the bits that it would give as an op of its own.
inline f32x16 rounded(f32x16 y, Dtype dtype) {
    if (dtype == Dtype::float32) return y;
    bf16 narrow[lanes];
    store(narrow, y);
    return load(narrow);
}

}  // namespace

void linear(const void* x, Dtype x_dtype, size_t x_stride, size_t M, const void* w, Format format, size_t w_stride,
            size_t N, size_t K, size_t group, ScaleType scale_type, Arithmetic arithmetic, const void* bias,
            Dtype bias_dtype, Activation activation, void* out, Dtype out_dtype, size_t out_stride,
            void* scratch) noexcept {
    const FlushSubnormals flush;
    const Weights weights{w, format, w_stride, N, K, group, scale_type};
    about_to_read(w, weights.panels() * weights.panel_bytes());
    char* at = static_cast<char*>(scratch);
    const Rows rows = place_rows(M, K, takes_float(format, arithmetic), at, keeps_bf16(format, x_dtype, M));
    prepare_rows(x, x_dtype, x_stride, M, K, rows);
    const size_t width = M > 1 ? tile_panels : 1, columns = ceil_div(weights.panels(), width);
    const size_t blocks = ceil_div(M, rows_of_block(rows)), per_block = ceil_div(M, blocks);
    parallel(blocks * columns, ceil_div(panel_grain(weights), width), [&](size_t begin, size_t end) {
        for (size_t item = begin; item < end; ++item) {
            const size_t panel = item % columns * width, m0 = item / columns * per_block;
            const size_t panels = weights.panels() - panel < width ? weights.panels() - panel : width;
            const size_t count_rows = M - m0 < per_block ? M - m0 : per_block;
            products_by_any(weights, panel, panels, rows.from(m0), nullptr, count_rows, [&](size_t p, size_t m, f32x16 y) {
                const size_t n = p * panel_rows, count = N - n;
                y = with_bias(y, bias, bias_dtype, n, count);
                if (activation == Activation::relu2) y = relu2(rounded(y, x_dtype));
                if (out_dtype != x_dtype) y = rounded(y, x_dtype);
                const size_t to = (m0 + m) * out_stride + n;
                if (out_dtype == Dtype::float32) store_some(static_cast<float*>(out) + to, y, count);
                else store_some(static_cast<bf16*>(out) + to, y, count);
            });
        }
    });
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
