// The product of one panel, 16 rows of a weight matrix, with up to 8 rows of activations: 16 sums per row, in lanes.
//
// Everything that multiplies weights is made of this (linear.cpp, experts.cpp), so an output has one order of additions
// whatever asks for it. Per byte of int4 weights a core has about 0.2 cycles per row before memory is no longer the bound.
#pragma once

#include "../simd_rows.h"
#include "activations.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {

// Rows of activations in one product. More would not fit in registers: three vectors a row, and AVX2 has two halves each.
#if defined(__AVX512F__)
constexpr size_t most_rows = 8;
#else
constexpr size_t most_rows = 4;
#endif

// Panels are fetched read_ahead bytes ahead of the reading (isa.cpp), so that memory stays busy while a core multiplies: a
// third of the bandwidth. It runs on into the next panel, and past the last one, where a prefetch does no harm.

struct Weights {
    const void* data;  // plain: the first row; packed: the first panel
    Format format;
    size_t stride;     // plain: elements from row to row
    size_t rows, cols, group;
    ScaleType scale_type;

    bool plain() const { return format == Format::float32 || format == Format::bfloat16; }
    size_t panels() const { return ceil_div(rows, panel_rows); }
    size_t panel_bytes() const {
        if (plain()) return panel_rows * cols * (format == Format::float32 ? 4 : 2);
        return PanelLayout(format, cols, group).bytes;
    }
};

inline int32_t quad(const int8_t* q) {
    int32_t four;
    __builtin_memcpy(&four, q, sizeof four);
    return four;
}

// 2^(c >> 4) · (1 + (c & 15) / 16) · 2^-15 of 16 codes c: they are the top bits of a float's exponent and mantissa.
inline f32x16 block_scales(const uint8_t* codes) {
    return as_float(add(shift_left(widen_bytes(codes), 19), fill_int(112 << 23)));
}

inline f32x16 group_scales(const uint8_t* p, size_t g, ScaleType type) {
    const uint16_t* at = reinterpret_cast<const uint16_t*>(p) + g * panel_rows;
    return type == ScaleType::float16 ? load_half(at) : load(reinterpret_cast<const bf16*>(at));
}

// Σ over 32 k, exact; `four`: nibbles, whose offset of 8 is taken off through the sum of the activations.
template <size_t M, bool four>
inline void dot_32(const uint8_t* values, const int8_t* const* q, size_t k, const int32_t* const* sums, bool offset,
                   i32x16* dot) {
    for (size_t m = 0; m < M; ++m) {
        const int32_t sum = sums[m][k / sum_cols];
        dot[m] = four ? fill_int(offset ? -8 * sum : 0) : start_signed(sum);
    }
    for (size_t i = 0; i < (four ? 4 : 8); ++i) {
        const uint8_t* at = values + 64 * i;
        prefetch(at + read_ahead);
        const bytes64 w = load_bytes(at);
        if constexpr (four) {
            const bytes64 low = low_nibbles(w), high = high_nibbles(w);
            for (size_t m = 0; m < M; ++m) {
                dot[m] = dot_nibbles(dot[m], low, quad(q[m] + k + 8 * i));
                dot[m] = dot_nibbles(dot[m], high, quad(q[m] + k + 8 * i + 4));
            }
        } else {
            for (size_t m = 0; m < M; ++m) dot[m] = dot_signed(dot[m], w, quad(q[m] + k + 4 * i));
        }
    }
}

// The multipliers of 32 k, with their signs.
inline i32x16 multipliers(const uint8_t* panel, const PanelLayout& layout, size_t chunk, size_t half) {
    const i32x16 pair = widen_bytes(panel + layout.multipliers + chunk * panel_rows);
    uint16_t signs;
    __builtin_memcpy(&signs, panel + layout.signs + (2 * chunk + half) * sizeof signs, sizeof signs);
    return negate(half ? high_nibble(pair) : low_nibble(pair), signs);
}

struct RowPointers {
    const int8_t* q[most_rows];
    const float* scales[most_rows];
    const int32_t* sums[most_rows];
    const float* wide[most_rows];
};

template <size_t M, bool four>
inline void own_panel(const uint8_t* panel, const PanelLayout& layout, const RowPointers& x, f32x16* acc) {
    constexpr size_t bytes_32 = four ? 256 : 512;
    const uint8_t* values = panel + layout.values;
    for (size_t m = 0; m < M; ++m) acc[m] = fill(0.0f);
    for (size_t b = 0; b < layout.blocks; ++b) {
        const size_t chunks = layout.chunks - 2 * b < 2 ? 1 : 2;
        i32x16 total[M], dot[M];
        for (size_t m = 0; m < M; ++m) total[m] = fill_int(0);
        for (size_t c = 2 * b; c < 2 * b + chunks; ++c) {
            for (size_t half = 0; half < 2; ++half, values += bytes_32) {
                dot_32<M, four>(values, x.q, c * chunk_cols + half * multiplier_cols, x.sums, true, dot);
                if constexpr (four) {
                    const i32x16 factor = multipliers(panel, layout, c, half);
                    for (size_t m = 0; m < M; ++m) total[m] = add(total[m], mul_short(dot[m], factor));
                } else {
                    for (size_t m = 0; m < M; ++m) total[m] = add(total[m], dot[m]);
                }
            }
        }
        const f32x16 scale = block_scales(panel + layout.scales + b * panel_rows);
        for (size_t m = 0; m < M; ++m) acc[m] = fma(to_float(total[m]), mul(fill(x.scales[m][b]), scale), acc[m]);
    }
    const f32x16 row_scale = load(reinterpret_cast<const float*>(panel));
    for (size_t m = 0; m < M; ++m) acc[m] = mul(acc[m], row_scale);
}

template <size_t M, bool four, bool has_min>
inline void grouped_panel(const uint8_t* panel, const PanelLayout& layout, size_t group, ScaleType type,
                          const RowPointers& x, f32x16* acc) {
    constexpr size_t bytes_32 = four ? 256 : 512;
    const uint8_t* values = panel + layout.values;
    const size_t cols = layout.chunks * chunk_cols;
    for (size_t m = 0; m < M; ++m) acc[m] = fill(0.0f);
    for (size_t first = 0, g = 0; first < cols; first += group, ++g) {
        const size_t end = first + group < cols ? first + group : cols;
        i32x16 total[M], dot[M];
        int32_t sum[M] = {};
        for (size_t m = 0; m < M; ++m) total[m] = fill_int(0);
        for (size_t k = first; k < end; k += sum_cols, values += bytes_32) {
            dot_32<M, four>(values, x.q, k, x.sums, !has_min, dot);
            for (size_t m = 0; m < M; ++m) total[m] = add(total[m], dot[m]), sum[m] += x.sums[m][k / sum_cols];
        }
        const f32x16 scale = group_scales(panel, g, type);
        for (size_t m = 0; m < M; ++m) {
            const f32x16 x_scale = fill(x.scales[m][first / block_cols]);
            acc[m] = fma(to_float(total[m]), mul(x_scale, scale), acc[m]);
            if constexpr (has_min) {
                const f32x16 low = load(reinterpret_cast<const float*>(panel + layout.minimums) + g * panel_rows);
                acc[m] = fma(mul(to_float(fill_int(sum[m])), x_scale), low, acc[m]);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Packed weights with float32 activations: the same panels, each value widened and multiplied by its x in the order of k
// within a block (of 128 k, or a group), the block's sum times its scale added by one fused multiply-add.

template <size_t M, int k>
inline void fma_byte(bytes64 w, f32x16 factor, const float* const* wide, size_t at, f32x16* part) {
    const f32x16 value = mul(byte_as_float<k>(w), factor);  // exact: at most 15 · 8
    for (size_t m = 0; m < M; ++m) part[m] = fma(value, fill(wide[m][at + k]), part[m]);
}

template <size_t M>
inline void fma_quad(bytes64 w, f32x16 factor, const float* const* wide, size_t at, f32x16* part) {
    fma_byte<M, 0>(w, factor, wide, at, part);
    fma_byte<M, 1>(w, factor, wide, at, part);
    fma_byte<M, 2>(w, factor, wide, at, part);
    fma_byte<M, 3>(w, factor, wide, at, part);
}

template <size_t M, bool four>
inline void floating_32(const uint8_t* values, size_t k, bool offset, f32x16 factor, const float* const* wide,
                        f32x16* part) {
    for (size_t i = 0; i < (four ? 4 : 8); ++i) {
        const bytes64 w = load_bytes(values + 64 * i);
        if constexpr (four) {
            const bytes64 low = low_nibbles(w), high = high_nibbles(w);
            fma_quad<M>(offset ? minus_eight(low) : low, factor, wide, k + 8 * i, part);
            fma_quad<M>(offset ? minus_eight(high) : high, factor, wide, k + 8 * i + 4, part);
        } else {
            fma_quad<M>(w, factor, wide, k + 4 * i, part);
        }
    }
}

template <size_t M, bool four>
inline void own_panel_floating(const uint8_t* panel, const PanelLayout& layout, const RowPointers& x, f32x16* acc) {
    const uint8_t* values = panel + layout.values;
    for (size_t m = 0; m < M; ++m) acc[m] = fill(0.0f);
    for (size_t b = 0; b < layout.blocks; ++b) {
        const size_t last = 2 * b + 2 < layout.chunks ? 2 * b + 2 : layout.chunks;
        f32x16 part[M];
        for (size_t m = 0; m < M; ++m) part[m] = fill(0.0f);
        for (size_t c = 2 * b; c < last; ++c) {
            for (size_t half = 0; half < 2; ++half, values += four ? 256 : 512) {
                f32x16 factor = fill(1.0f);
                if constexpr (four) factor = to_float(multipliers(panel, layout, c, half));
                floating_32<M, four>(values, c * chunk_cols + half * multiplier_cols, true, factor, x.wide, part);
            }
        }
        const f32x16 scale = block_scales(panel + layout.scales + b * panel_rows);
        for (size_t m = 0; m < M; ++m) acc[m] = fma(part[m], scale, acc[m]);
    }
    const f32x16 row_scale = load(reinterpret_cast<const float*>(panel));
    for (size_t m = 0; m < M; ++m) acc[m] = mul(acc[m], row_scale);
}

template <size_t M, bool four, bool has_min>
inline void grouped_panel_floating(const uint8_t* panel, const PanelLayout& layout, size_t group, ScaleType type,
                                   const RowPointers& x, f32x16* acc) {
    const uint8_t* values = panel + layout.values;
    const size_t cols = layout.chunks * chunk_cols;
    for (size_t m = 0; m < M; ++m) acc[m] = fill(0.0f);
    for (size_t first = 0, g = 0; first < cols; first += group, ++g) {
        const size_t end = first + group < cols ? first + group : cols;
        f32x16 part[M], ones[M];
        for (size_t m = 0; m < M; ++m) part[m] = ones[m] = fill(0.0f);
        for (size_t k = first; k < end; k += sum_cols, values += four ? 256 : 512) {
            floating_32<M, four>(values, k, !has_min, fill(1.0f), x.wide, part);
            for (size_t m = 0; m < M; ++m) ones[m] = add(ones[m], add(load(x.wide[m] + k), load(x.wide[m] + k + lanes)));
        }
        const f32x16 scale = group_scales(panel, g, type);
        for (size_t m = 0; m < M; ++m) {
            acc[m] = fma(part[m], scale, acc[m]);
            if constexpr (has_min) {
                const f32x16 low = load(reinterpret_cast<const float*>(panel + layout.minimums) + g * panel_rows);
                acc[m] = fma(fill(sum(ones[m])), low, acc[m]);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Plain rows. 16 rows of 32 k are loaded as they lie and transposed in registers, so that a lane is a row here as well:
// the sum then can have the matrix unit's order (tdpbf16ps: for each 32 k an even and an odd chain from zero, their sum
// added to the total), which no horizontal sum gives. Reading sixteen streams and turning them costs a third of the
// bandwidth; packed bfloat16 has both behind it.

inline size_t clamped(size_t row, size_t rows) { return row < rows ? row : rows - 1; }

// The products of columns k and k + 1 of 16 rows, the even one in the low halves of the words.
template <size_t M>
inline void add_pair(f32x16 words, const RowPointers& x, size_t k, f32x16* even, f32x16* odd) {
    const f32x16 first = first_half(words), second = second_half(words);
    for (size_t m = 0; m < M; ++m) {
        even[m] = fma(first, fill(x.wide[m][k]), even[m]);
        odd[m] = fma(second, fill(x.wide[m][k + 1]), odd[m]);
    }
}

// Sixteen words of 16 rows, of which `left` bytes are there, transposed.
template <typename W>
inline void load_turned(const W* const* rows, size_t k, size_t left, f32x16 (&words)[lanes]) {
    const size_t bytes = left * sizeof(W);
    if (bytes >= 64) {
        for (size_t r = 0; r < panel_rows; ++r) words[r] = load_words(rows[r] + k, 64);
    } else {
        for (size_t r = 0; r < panel_rows; ++r) words[r] = load_words(rows[r] + k, bytes);
    }
    transpose(words);
}

// Columns k..k+31 of 16 rows; those beyond `left` columns count as zero.
template <size_t M>
inline void add_columns(const bf16* const* rows, size_t k, size_t left, const RowPointers& x, f32x16* even, f32x16* odd) {
    f32x16 words[lanes];
    load_turned(rows, k, left, words);
    for (size_t j = 0; j < lanes; ++j) add_pair<M>(words[j], x, k + 2 * j, even, odd);
}
template <size_t M>
inline void add_columns(const float* const* rows, size_t k, size_t left, const RowPointers& x, f32x16* even, f32x16* odd) {
    for (size_t half = 0; half < 32; half += lanes) {
        f32x16 columns[lanes];
        load_turned(rows, k + half, left > half ? left - half : 0, columns);
        for (size_t j = 0; j < lanes; j += 2) {
            for (size_t m = 0; m < M; ++m) {
                even[m] = fma(columns[j], fill(x.wide[m][k + half + j]), even[m]);
                odd[m] = fma(columns[j + 1], fill(x.wide[m][k + half + j + 1]), odd[m]);
            }
        }
    }
}

template <size_t M, typename W>
inline void plain_panel(const W* first, size_t stride, size_t rows, size_t cols, const RowPointers& x, f32x16* acc) {
    const W* row[panel_rows];
    for (size_t r = 0; r < panel_rows; ++r) row[r] = first + clamped(r, rows) * stride;
    for (size_t m = 0; m < M; ++m) acc[m] = fill(0.0f);
    for (size_t k = 0; k < cols; k += tile_cols) {
        for (size_t r = 0; r < panel_rows; ++r) prefetch(row[r] + k + read_ahead / 4 / sizeof(W));
        f32x16 even[M], odd[M];
        for (size_t m = 0; m < M; ++m) even[m] = odd[m] = fill(0.0f);
        add_columns<M>(row, k, cols - k, x, even, odd);
        for (size_t m = 0; m < M; ++m) acc[m] = add(acc[m], add(even[m], odd[m]));
    }
}

// Packed bfloat16: the same products in the same order, so the same bits, without sixteen streams and their turning. The
// chains of a tile do not wait for those of the tile before, so even for one row memory stays the bound.
template <size_t M>
inline void bf16_panel(const uint8_t* panel, size_t cols, const RowPointers& x, f32x16* acc) {
    for (size_t m = 0; m < M; ++m) acc[m] = fill(0.0f);
    for (size_t k = 0; k < cols; k += tile_cols, panel += tile_bytes) {
        f32x16 even[M], odd[M];
        for (size_t m = 0; m < M; ++m) even[m] = odd[m] = fill(0.0f);
        for (size_t j = 0; j < tile_cols / 2; ++j) {
            const uint8_t* line = panel + 64 * j;
            prefetch(line + read_ahead);
            add_pair<M>(load_words(line, 64), x, k + 2 * j, even, odd);
        }
        for (size_t m = 0; m < M; ++m) acc[m] = add(acc[m], add(even[m], odd[m]));
    }
}

// ---------------------------------------------------------------------------------------------------------------------

template <size_t M>
inline void panel_product(const Weights& w, size_t panel, const RowPointers& x, bool wide, f32x16* acc) {
    if (w.plain()) {
        const size_t row = panel * panel_rows;
        if (w.format == Format::float32)
            return plain_panel<M>(static_cast<const float*>(w.data) + row * w.stride, w.stride, w.rows - row, w.cols, x, acc);
        return plain_panel<M>(static_cast<const bf16*>(w.data) + row * w.stride, w.stride, w.rows - row, w.cols, x, acc);
    }
    const PanelLayout layout(w.format, w.cols, w.group);
    const uint8_t* at = static_cast<const uint8_t*>(w.data) + panel * layout.bytes;
    const size_t g = w.group;
    const ScaleType t = w.scale_type;
    switch (w.format) {
        case Format::int8: return wide ? own_panel_floating<M, false>(at, layout, x, acc) : own_panel<M, false>(at, layout, x, acc);
        case Format::int4: return wide ? own_panel_floating<M, true>(at, layout, x, acc) : own_panel<M, true>(at, layout, x, acc);
        case Format::grouped8:
            return wide ? grouped_panel_floating<M, false, false>(at, layout, g, t, x, acc) : grouped_panel<M, false, false>(at, layout, g, t, x, acc);
        case Format::grouped4:
            return wide ? grouped_panel_floating<M, true, false>(at, layout, g, t, x, acc) : grouped_panel<M, true, false>(at, layout, g, t, x, acc);
        case Format::grouped8_min:
            return wide ? grouped_panel_floating<M, false, true>(at, layout, g, t, x, acc) : grouped_panel<M, false, true>(at, layout, g, t, x, acc);
        case Format::grouped4_min:
            return wide ? grouped_panel_floating<M, true, true>(at, layout, g, t, x, acc) : grouped_panel<M, true, true>(at, layout, g, t, x, acc);
        case Format::packed_bf16: return bf16_panel<M>(at, w.cols, x, acc);
        default: return;
    }
}

// Rows first .. first + M of x, or of those that `at` lists.
inline RowPointers point_to(const Rows& x, const size_t* at, size_t first, size_t M) {
    RowPointers p{};
    for (size_t m = 0; m < M; ++m) {
        const size_t row = at == nullptr ? first + m : at[first + m];
        if (x.wide != nullptr) {
            p.wide[m] = x.wide + row * x.cols;
        } else {
            p.q[m] = x.q + row * x.cols;
            p.scales[m] = x.scales + row * x.blocks();
            p.sums[m] = x.sums + row * (x.cols / sum_cols);
        }
    }
    return p;
}

// acc[i] of the rows at[0..count) of x, in products of at most `most_rows`.
template <typename Use>
inline void panel_products(const Weights& w, size_t panel, const Rows& x, const size_t* at, size_t count, const Use& use) {
    f32x16 acc[most_rows];
    for (size_t first = 0; first < count; first += most_rows) {
        const size_t M = count - first < most_rows ? count - first : most_rows;
        const RowPointers p = point_to(x, at, first, M);
        const bool wide = x.wide != nullptr;
        switch (M) {
            case 1: panel_product<1>(w, panel, p, wide, acc); break;
            case 2: panel_product<2>(w, panel, p, wide, acc); break;
            case 3: panel_product<3>(w, panel, p, wide, acc); break;
            case 4: panel_product<4>(w, panel, p, wide, acc); break;
#if defined(__AVX512F__)
            case 5: panel_product<5>(w, panel, p, wide, acc); break;
            case 6: panel_product<6>(w, panel, p, wide, acc); break;
            case 7: panel_product<7>(w, panel, p, wide, acc); break;
            default: panel_product<8>(w, panel, p, wide, acc); break;
#endif
        }
        for (size_t m = 0; m < M; ++m) use(first + m, acc[m]);
    }
}

// Panels per block of work: about 32 KB of weights, and at least 4 blocks a thread where there are so many panels.
inline size_t panel_grain(const Weights& w) {
    const size_t by_bytes = ceil_div(32768, w.panel_bytes()), by_count = ceil_div(w.panels(), 4 * threads());
    return by_bytes < by_count ? by_bytes : by_count;
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
