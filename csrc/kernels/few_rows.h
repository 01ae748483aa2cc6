// The product of two panels with 2 to 16 rows of activations: drafted tokens, a small batch, an expert's few visitors.
//
// product.h reads each activation once per panel; slabs (many_rows.h) are unpacked into memory first, which too few rows
// pay for. Here 128 k (or a group) of two panels are taken apart in registers and met by up to 8 rows at once: 16 sums,
// and an activation serves two products. Four rows take 1.05 times as long as memory needs, eight 1.2 to 1.8 times, by the
// speed of memory; the next eight find 512 k of both panels in the first cache.
//
// The multipliers of int4 could meet the weights (`times`: three instructions for a vector of nibbles, however many rows
// follow). As in product.h they meet the sums over 32 k (two for each row, or one where it adds as well), which is less
// work up to 8 rows.
//
// With few rows the bound is latency: a product waits five cycles for the one before it in its sum, and the processor
// finishes two a cycle, so up to 4 rows split each sum in two.
//
// The bits are product.h's, for the reasons given in many_rows.h.
#pragma once

#include "product.h"

#if defined(__AVX512F__)
namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {

constexpr size_t pair_panels = 2;
constexpr size_t most_pair_rows = 16;  // up to here; 8 of them at once
constexpr size_t pair_cols = 512;      // that the second 8 find in the first cache

// Of a group of 128, 64 or 32 columns.
inline int32_t sum_of(const int32_t* sums, size_t count) {
    return count == 4 ? sums[0] + sums[1] + (sums[2] + sums[3]) : count == 2 ? sums[0] + sums[1] : sums[0];
}

// Of products that wait for one another: with few rows an accumulator is split.
template <size_t R>
constexpr size_t chains() { return R <= 4 ? 2 : 1; }

// Products of columns k .. k + 32 of both panels, which lie at values[p], with R rows.
template <size_t R, bool four>
inline void dots_32(const uint8_t* const* values, const uint8_t* const* ahead, const int8_t* const* q, size_t k, bool fetch,
                    i32x16 (&dot)[R][pair_panels][2]) {
#pragma GCC unroll 8
    for (size_t i = 0; i < (four ? 4 : 8); ++i) {
        bytes64 low[pair_panels], high[pair_panels];
        for (size_t p = 0; p < pair_panels; ++p) {
            if (fetch) prefetch(ahead[p] + 64 * i);
            const bytes64 w = load_bytes(values[p] + 64 * i);
            if constexpr (four) {
                low[p] = low_nibbles(w), high[p] = high_nibbles(w);
            } else {
                low[p] = biased(w);
            }
        }
        for (size_t r = 0; r < R; ++r) {
            const int32_t x = quad(q[r] + k + (four ? 8 : 4) * i);
            const size_t c = four ? 0 : i % chains<R>();
            for (size_t p = 0; p < pair_panels; ++p) dot[r][p][c] = dot_biased(dot[r][p][c], low[p], x);
        }
        if constexpr (four) {
            for (size_t r = 0; r < R; ++r) {
                const size_t c = 1 % chains<R>();
                const int32_t x = quad(q[r] + k + 8 * i + 4);
                for (size_t p = 0; p < pair_panels; ++p) dot[r][p][c] = dot_biased(dot[r][p][c], high[p], x);
            }
        }
    }
}

// What is fetched while both panels are read from `values` on. Behind the end of a panel follows the beginning of the one
// after the other panel, read next.
inline void point_ahead(const uint8_t* const* values, const uint8_t* panel, const PanelLayout& layout, size_t distance,
                        const uint8_t** ahead) {
    for (size_t p = 0; p < pair_panels; ++p) {
        ahead[p] = values[p] + distance;
        if (ahead[p] >= panel + (p + 1) * layout.bytes) ahead[p] += (pair_panels - 1) * layout.bytes;
    }
}

// Columns first .. end of two panels, whole groups but for the matrix's last. acc: [row][panel][16].
template <size_t R, bool four, bool own, bool has_min>
void pair_columns(const Weights& w, const uint8_t* panel, const PanelLayout& layout, size_t first, size_t end,
                  const RowPointers& x, bool fetch, float* acc) {
    const size_t group = own ? block_cols : w.group;
    const uint8_t* values[pair_panels];
    for (size_t p = 0; p < pair_panels; ++p)
        values[p] = panel + p * layout.bytes + layout.values + first * panel_rows / (four ? 2 : 1);
    for (size_t begin = first, g = first / group; begin < end; begin += group, ++g) {
        const size_t stop = begin + group < end ? begin + group : end;
        i32x16 dot[R][pair_panels][2];
        int32_t sum[R];
        for (size_t r = 0; r < R; ++r) {
            sum[r] = sum_of(x.sums[r] + begin / sum_cols, (stop - begin) / sum_cols);
            const i32x16 start = own || !four ? start_signed(sum[r]) : fill_int(has_min ? 0 : -8 * sum[r]);
            for (size_t p = 0; p < pair_panels; ++p) dot[r][p][0] = start, dot[r][p][1] = fill_int(0);
        }
        size_t k = begin;
        do {
            const uint8_t* ahead[pair_panels];
            point_ahead(values, panel, layout, read_ahead, ahead);
            dots_32<R, four>(values, ahead, x.q, k, fetch, dot);
            for (size_t p = 0; p < pair_panels; ++p) values[p] += four ? 256 : 512;
            k += sum_cols;
        } while (k < stop);
        for (size_t p = 0; p < pair_panels; ++p) {
            const uint8_t* at = panel + p * layout.bytes;
            const f32x16 scale =
                own ? block_scales(at + layout.scales + g * panel_rows) : group_scales(at, g, w.scale_type);
            f32x16 least;
            if constexpr (has_min) least = load(reinterpret_cast<const float*>(at + layout.minimums) + g * panel_rows);
            for (size_t r = 0; r < R; ++r) {
                float* total = acc + (r * pair_panels + p) * lanes;
                const f32x16 x_scale = fill(x.scales[r][begin / block_cols]);
                const i32x16 whole = chains<R>() == 2 ? add(dot[r][p][0], dot[r][p][1]) : dot[r][p][0];
                f32x16 y = fma(to_float(whole), mul(x_scale, scale), load(total));
                if constexpr (has_min) y = fma(mul(to_float(fill_int(sum[r])), x_scale), least, y);
                store(total, y);
            }
        }
    }
}

// The sums over 32 k of both panels' nibbles with R rows, 8 off each nibble by way of the sums of the activations. They
// begin anew every 32 k, so the processor works on the next ones while these wait for their last product.
template <size_t R>
inline void nibbles_32(const uint8_t* const* values, const uint8_t* const* ahead, const RowPointers& x, size_t k,
                       i32x16 (&dot)[R][pair_panels]) {
    for (size_t r = 0; r < R; ++r) {
        const i32x16 start = fill_int(-8 * x.sums[r][k / sum_cols]);
        for (size_t p = 0; p < pair_panels; ++p) dot[r][p] = start;
    }
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i) {
        bytes64 low[pair_panels], high[pair_panels];
        for (size_t p = 0; p < pair_panels; ++p) {
            prefetch(ahead[p] + 64 * i);
            const bytes64 w = load_bytes(values[p] + 64 * i);
            low[p] = low_nibbles(w), high[p] = high_nibbles(w);
        }
        for (size_t r = 0; r < R; ++r) {
            const int32_t four = quad(x.q[r] + k + 8 * i);
            for (size_t p = 0; p < pair_panels; ++p) dot[r][p] = dot_nibbles(dot[r][p], low[p], four);
        }
        for (size_t r = 0; r < R; ++r) {
            const int32_t four = quad(x.q[r] + k + 8 * i + 4);
            for (size_t p = 0; p < pair_panels; ++p) dot[r][p] = dot_nibbles(dot[r][p], high[p], four);
        }
    }
}

// pair_columns for own int4 and up to 4 rows, whose multipliers meet the sums.
template <size_t R>
void own4_columns(const Weights&, const uint8_t* panel, const PanelLayout& layout, size_t first, size_t end,
                  const RowPointers& x, bool, float* acc) {
    // Two streams at once, neither held up by arithmetic: each is fetched less far ahead, or the first cache overflows.
    const size_t distance = read_ahead / 192 * 128;
    const uint8_t* values[pair_panels];
    for (size_t p = 0; p < pair_panels; ++p) values[p] = panel + p * layout.bytes + layout.values + first * panel_rows / 2;
    f32x16 y[R][pair_panels];
    for (size_t r = 0; r < R; ++r)
        for (size_t p = 0; p < pair_panels; ++p) y[r][p] = load(acc + (r * pair_panels + p) * lanes);
    for (size_t begin = first; begin < end; begin += block_cols) {
        const size_t stop = begin + block_cols < end ? begin + block_cols : end, block = begin / block_cols;
        i32x16 total[R][pair_panels];
        for (size_t r = 0; r < R; ++r)
            for (size_t p = 0; p < pair_panels; ++p) total[r][p] = fill_int(0);
        for (size_t k = begin; k < stop; k += multiplier_cols) {
            const uint8_t* ahead[pair_panels];
            point_ahead(values, panel, layout, distance, ahead);
            i32x16 dot[R][pair_panels];
            nibbles_32<R>(values, ahead, x, k, dot);
            for (size_t p = 0; p < pair_panels; ++p) {
                const uint8_t* at = panel + p * layout.bytes;
                const i32x16 m = multipliers(at, layout, k / chunk_cols, k / multiplier_cols % 2);
                for (size_t r = 0; r < R; ++r) total[r][p] = add(total[r][p], mul_short(dot[r][p], m));
                values[p] += 256;
            }
        }
        for (size_t p = 0; p < pair_panels; ++p) {
            const f32x16 scale = block_scales(panel + p * layout.bytes + layout.scales + block * panel_rows);
            for (size_t r = 0; r < R; ++r)
                y[r][p] = fma(to_float(total[r][p]), mul(fill(x.scales[r][block]), scale), y[r][p]);
        }
    }
    for (size_t r = 0; r < R; ++r)
        for (size_t p = 0; p < pair_panels; ++p) store(acc + (r * pair_panels + p) * lanes, y[r][p]);
}

// The same for 5 to 8 rows. As |nibble - 8| is at most 8 and a row's byte at most 127, a sum over 32 k fits 16 bits, and
// one instruction multiplies it and adds it to the total of 128 k: 16 of them for 8 rows and two panels, where the
// nibbles themselves would take 48. The sums fill the registers, so the totals, [row][panel][16], lie in the first cache.
// offsets: of row r at 4 r, where its sum starts.
template <size_t R, bool fetch>
inline void summed_32(const uint8_t* const* values, const uint8_t* const* ahead, const i32x16* m, const int8_t* const* q,
                      size_t k, const int32_t* offsets, int32_t* total) {
    i32x16 dot[R][pair_panels];
    for (size_t r = 0; r < R; ++r)
        for (size_t p = 0; p < pair_panels; ++p) dot[r][p] = fill_int(offsets[4 * r]);
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i) {
        bytes64 low[pair_panels], high[pair_panels];
        for (size_t p = 0; p < pair_panels; ++p) {
            if (fetch) prefetch(ahead[p] + 64 * i);
            const bytes64 w = load_bytes(values[p] + 64 * i);
            low[p] = low_nibbles(w), high[p] = high_nibbles(w);
        }
        for (size_t r = 0; r < R; ++r) {
            const int32_t x = quad(q[r] + k + 8 * i);
            for (size_t p = 0; p < pair_panels; ++p) dot[r][p] = dot_nibbles(dot[r][p], low[p], x);
        }
        for (size_t r = 0; r < R; ++r) {
            const int32_t x = quad(q[r] + k + 8 * i + 4);
            for (size_t p = 0; p < pair_panels; ++p) dot[r][p] = dot_nibbles(dot[r][p], high[p], x);
        }
    }
    for (size_t r = 0; r < R; ++r) {
        for (size_t p = 0; p < pair_panels; ++p) {
            int32_t* at = total + (r * pair_panels + p) * lanes;
            store(at, add_short(load_ints(at), dot[r][p], m[p]));
        }
    }
}

// pair_columns for own int4 and 5 to 8 rows.
template <size_t R>
void summed_columns(const Weights&, const uint8_t* panel, const PanelLayout& layout, size_t first, size_t end,
                    const RowPointers& x, bool fetch, float* acc) {
    alignas(64) int32_t total[R * pair_panels * lanes], offsets[R * 4];
    const uint8_t* values[pair_panels];
    for (size_t p = 0; p < pair_panels; ++p)
        values[p] = panel + p * layout.bytes + layout.values + first * panel_rows / 2;
    for (size_t begin = first; begin < end; begin += block_cols) {
        const size_t stop = begin + block_cols < end ? begin + block_cols : end;
        for (size_t r = 0; r < R; ++r)
            for (size_t i = 0; i < 4; ++i) offsets[4 * r + i] = -8 * x.sums[r][begin / sum_cols + i];
        for (size_t i = 0; i < R * pair_panels; ++i) store(total + i * lanes, fill_int(0));
        for (size_t k = begin; k < stop; k += sum_cols) {
            i32x16 m[pair_panels];
            const uint8_t* ahead[pair_panels];
            for (size_t p = 0; p < pair_panels; ++p)
                m[p] = low_half(multipliers(panel + p * layout.bytes, layout, k / chunk_cols, k / multiplier_cols % 2));
            point_ahead(values, panel, layout, read_ahead, ahead);
            if (fetch) summed_32<R, true>(values, ahead, m, x.q, k, offsets + (k - begin) / sum_cols, total);
            else summed_32<R, false>(values, ahead, m, x.q, k, offsets + (k - begin) / sum_cols, total);
            for (size_t p = 0; p < pair_panels; ++p) values[p] += 256;
        }
        for (size_t p = 0; p < pair_panels; ++p) {
            const uint8_t* codes = panel + p * layout.bytes + layout.scales + begin / block_cols * panel_rows;
            const f32x16 scale = block_scales(codes);
            for (size_t r = 0; r < R; ++r) {
                const size_t at = (r * pair_panels + p) * lanes;
                const f32x16 x_scale = fill(x.scales[r][begin / block_cols]);
                store(acc + at, fma(to_float(load_ints(total + at)), mul(x_scale, scale), load(acc + at)));
            }
        }
    }
}

using PairColumns = void(const Weights&, const uint8_t*, const PanelLayout&, size_t, size_t, const RowPointers&, bool,
                         float*);

template <size_t R>
inline PairColumns* pair_kernel(Format format) {
    switch (format) {
        case Format::int8: return pair_columns<R, false, true, false>;
        case Format::int4:
            if constexpr (R <= 4) return own4_columns<R>;
            else return summed_columns<R>;
        case Format::grouped8: return pair_columns<R, false, false, false>;
        case Format::grouped4: return pair_columns<R, true, false, false>;
        case Format::grouped8_min: return pair_columns<R, false, false, true>;
        default: return pair_columns<R, true, false, true>;
    }
}

inline PairColumns* pair_kernel(size_t rows, Format format) {
    switch (rows) {
        case 2: return pair_kernel<2>(format);
        case 3: return pair_kernel<3>(format);
        case 4: return pair_kernel<4>(format);
        case 5: return pair_kernel<5>(format);
        case 6: return pair_kernel<6>(format);
        case 7: return pair_kernel<7>(format);
        default: return pair_kernel<8>(format);
    }
}

// use(panel + p, i, 16 sums) of the rows at[0..count) of x, at most most_pair_rows.
template <typename Use>
inline void pair_products(const Weights& w, size_t panel, const Rows& x, const size_t* at, size_t count, const Use& use) {
    const PanelLayout layout(w.format, w.cols, w.group);
    const uint8_t* data = static_cast<const uint8_t*>(w.data) + panel * layout.bytes;
    const bool own = w.format == Format::int8 || w.format == Format::int4;
    const size_t cols = layout.chunks * chunk_cols, low = count / 2;
    const size_t second = count > most_rows ? low : 0, front = count - second;  // rows of the two tiles
    const RowPointers rows = point_to(x, at, 0, front), others = point_to(x, at, front, second);
    PairColumns* const run = pair_kernel(front, w.format);
    PairColumns* const again = pair_kernel(second, w.format);
    alignas(64) float acc[most_pair_rows * pair_panels * lanes];
    for (size_t i = 0; i < count * pair_panels; ++i) store(acc + i * lanes, fill(0.0f));
    const size_t step = second == 0 ? cols : pair_cols;
    for (size_t first = 0; first < cols; first += step) {
        const size_t end = cols - first < step ? cols : first + step;
        run(w, data, layout, first, end, rows, true, acc);
        if (second != 0) again(w, data, layout, first, end, others, false, acc + front * pair_panels * lanes);
    }
    for (size_t m = 0; m < count; ++m) {
        for (size_t p = 0; p < pair_panels; ++p) {
            f32x16 y = load(acc + (m * pair_panels + p) * lanes);
            if (own) y = mul(y, load(reinterpret_cast<const float*>(data + p * layout.bytes)));
            use(panel + p, m, y);
        }
    }
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
#endif
