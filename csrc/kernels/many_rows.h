// The product of two panels with more rows of activations than registers hold: a prompt, a batch, an expert's visitors.
//
// product.h and few_rows.h take the weights apart anew for every 8 rows. Here a slab of 512 k of two panels is unpacked
// once, to int8 in 16 KB of the first cache, and met by all rows of a block, a tile of 6 rows and 2 panels at a time: 12
// sums of integers, 12 of floats and two vectors of weights fill the registers. Every four k cost two loads of weights,
// six of activations and 12 instructions that multiply, so the multipliers are the bound. bfloat16 goes the same way, in
// 12 pairs of chains, 256 k at a time, with nothing to unpack.
//
// The bits are product.h's. Integers are exact within a group in any order, also when each weight has been multiplied by
// its sign and multiplier first: at most 15 · 8, an int8. The floats then see the same operations in the same order; a
// sum that waits in memory while other rows have the slab is a float32 there as in a register.
#pragma once

#include "few_rows.h"
#include "tiles.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {

// Of a tile. AVX2 has 16 registers of half the size, and without the dot product of bytes integers gain nothing from
// slabs: there they go through product.h, a block of rows at a time.
#if defined(__AVX512F__)
constexpr size_t tile_panels = 2, tile_rows = 6;
#else
constexpr size_t tile_panels = 1, tile_rows = 3;
#endif

constexpr size_t slab_cols = 512;  // of bfloat16 half as many, which are as many bytes
constexpr size_t block_rows = 256;
// Of activations that should stay in the second cache, which has 2 MB on CPUs with matrix units.
#if defined(NEMOTRON_H_TILES)
constexpr size_t block_bytes = 1024 << 10;
#else
constexpr size_t block_bytes = 512 << 10;
#endif

// Rows up to which product.h is as fast: 8 wait for memory, and packed bfloat16 has nothing to take apart, so the next 8
// find a panel in the second cache.
inline size_t few_rows([[maybe_unused]] const Weights& w) {
#if defined(__AVX512F__)
    if (w.format == Format::packed_bf16) return 16;
#endif
    return 8;
}

struct Slab {
    alignas(64) uint8_t values[slab_cols / 4 * tile_panels * 64];  // [four k][panel][row][k]; bfloat16: [panel][line]
    alignas(64) float scales[slab_cols / 32 * tile_panels * panel_rows];  // [group][panel][row]
    alignas(64) float minimums[slab_cols / 32 * tile_panels * panel_rows];
};

// Rows that are multiplied together. Of int8 rows a slab needs 512 bytes each, which arrive from the third cache in time
// for vectors: weights are unpacked for as many rows however long these are. Matrix units and float32 rows, four times as
// wide, want them nearer: a row of a longer product is a smaller part of a block.
inline size_t rows_of_block(const Rows& x) {
#if defined(__AVX512F__) && !defined(NEMOTRON_H_TILES)
    if (x.q != nullptr) return block_rows;
#endif
    const size_t fitting = block_bytes / (x.cols * x.width());
    return fitting < 48 ? 48 : fitting < block_rows ? fitting : block_rows;
}

inline bool takes_many(const Weights& w, [[maybe_unused]] const Rows& x) {
#if defined(__AVX512F__)
    if (x.wide == nullptr) return true;
#endif
    return w.format == Format::bfloat16 || w.format == Format::packed_bf16;
}

// What the next slab needs of each panel. A share of it is fetched after every tile, so that memory works meanwhile.
struct Next {
    const uint8_t* at[tile_panels];
    size_t lines;
};

template <size_t R>
struct Height {
    static constexpr size_t rows = R;
};

// run(height, first row) over tiles of nearly equal height, at least half of tile_rows, where count > tile_rows; the height
// comes as a type, so that it is a constant.
template <typename Run>
inline void for_tiles(size_t count, size_t panels, const Next& next, const Run& run) {
    const size_t tiles = ceil_div(count, tile_rows), low = count / tiles, higher = count % tiles;
    for (size_t t = 0, row = 0; t < tiles; ++t) {
        const size_t rows = low + (t < higher ? 1 : 0);
        switch (rows) {
#if defined(__AVX512F__)
            case 6: run(Height<6>(), row); break;
            case 5: run(Height<5>(), row); break;
            case 4: run(Height<4>(), row); break;
#else
            case 2: run(Height<2>(), row); break;
#endif
            case 3: run(Height<3>(), row); break;
        }
        row += rows;
        for (size_t p = 0; p < panels; ++p)
            for (size_t i = t * next.lines / tiles; i < (t + 1) * next.lines / tiles; ++i) prefetch(next.at[p] + 64 * i);
    }
}

#if defined(__AVX512F__)
// ---------------------------------------------------------------------------------------------------------------------
// Columns first .. first + cols of one panel, the p-th of P, to signed bytes.

template <size_t P, bool four, bool own, bool has_min>
inline void unpack(const uint8_t* panel, const PanelLayout& layout, size_t first, size_t cols, size_t p, Slab& slab) {
    const uint8_t* from = panel + layout.values + first * panel_rows / (four ? 2 : 1);
    uint8_t* to = slab.values + 64 * p;
    for (size_t k = first; k < first + cols; k += multiplier_cols) {
        Multiplier m{};
        if constexpr (four && own) m = multiplier<true>(multipliers(panel, layout, k / chunk_cols, k / multiplier_cols % 2));
        for (size_t i = 0; i < (four ? 4 : 8); ++i, from += 64) {
            const bytes64 w = load_bytes(from);
            if constexpr (four) {
                const bytes64 low = low_nibbles(w), high = high_nibbles(w);
                store(to, own ? times(low, m) : biased(has_min ? low : minus_eight(low)));
                store(to + 64 * P, own ? times(high, m) : biased(has_min ? high : minus_eight(high)));
                to += 2 * 64 * P;
            } else {
                store(to, biased(w));
                to += 64 * P;
            }
        }
    }
}

template <size_t P>
inline void unpack(const Weights& w, const uint8_t* panel, const PanelLayout& layout, size_t first, size_t cols, size_t p,
                   Slab& slab) {
    const bool own = w.format == Format::int8 || w.format == Format::int4;
    const bool has_min = w.format == Format::grouped8_min || w.format == Format::grouped4_min;
    const size_t group = own ? block_cols : w.group;
    for (size_t k = 0; k < cols; k += group) {
        const size_t g = (first + k) / group, to = (k / group * P + p) * panel_rows;
        const f32x16 scale = own ? block_scales(panel + layout.scales + g * panel_rows) : group_scales(panel, g, w.scale_type);
        store(slab.scales + to, scale);
        if (has_min) store(slab.minimums + to, load(reinterpret_cast<const float*>(panel + layout.minimums) + g * panel_rows));
    }
    switch (w.format) {
        case Format::int8: return unpack<P, false, true, false>(panel, layout, first, cols, p, slab);
        case Format::int4: return unpack<P, true, true, false>(panel, layout, first, cols, p, slab);
        case Format::grouped4: return unpack<P, true, false, false>(panel, layout, first, cols, p, slab);
        case Format::grouped4_min: return unpack<P, true, false, true>(panel, layout, first, cols, p, slab);
        default: return unpack<P, false, false, false>(panel, layout, first, cols, p, slab);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// A tile's part of the sums: `cols` columns of x from `first` on. acc: [row][panel][16].

template <size_t P, size_t R, bool has_min>
inline void integer_tile(const Slab& slab, size_t first, size_t cols, size_t group, const RowPointers& x, float* acc) {
    f32x16 total[R][P];
    for (size_t r = 0; r < R; ++r)
        for (size_t p = 0; p < P; ++p) total[r][p] = load(acc + (r * P + p) * lanes);
    const uint8_t* values = slab.values;
    for (size_t k = 0, g = 0; k < cols; k += group, ++g) {
        const size_t begin = first + k, end = first + (k + group < cols ? k + group : cols);
        int32_t sum[R];
        i32x16 dot[R][P];
        for (size_t r = 0; r < R; ++r) {
            sum[r] = sum_of(x.sums[r] + begin / sum_cols, (end - begin) / sum_cols);
            for (size_t p = 0; p < P; ++p) dot[r][p] = start_signed(sum[r]);
        }
        for (size_t c = begin; c < end; c += sum_cols, values += sum_cols / 4 * 64 * P) {
#pragma GCC unroll 8
            for (size_t i = 0; i < sum_cols / 4; ++i) {
                bytes64 w[P];
                for (size_t p = 0; p < P; ++p) w[p] = load_bytes(values + 64 * (P * i + p));
                for (size_t r = 0; r < R; ++r) {
                    const int32_t four = quad(x.q[r] + c + 4 * i);
                    for (size_t p = 0; p < P; ++p) dot[r][p] = dot_biased(dot[r][p], w[p], four);
                }
            }
        }
        for (size_t r = 0; r < R; ++r) {
            const f32x16 x_scale = fill(x.scales[r][begin / block_cols]);
            for (size_t p = 0; p < P; ++p) {
                const size_t at = (g * P + p) * panel_rows;
                total[r][p] = fma(to_float(dot[r][p]), mul(x_scale, load(slab.scales + at)), total[r][p]);
                if constexpr (has_min) {
                    const f32x16 x_sum = mul(to_float(fill_int(sum[r])), x_scale);
                    total[r][p] = fma(x_sum, load(slab.minimums + at), total[r][p]);
                }
            }
        }
    }
    for (size_t r = 0; r < R; ++r)
        for (size_t p = 0; p < P; ++p) store(acc + (r * P + p) * lanes, total[r][p]);
}

// ---------------------------------------------------------------------------------------------------------------------

template <size_t P>
inline void integer_slabs(const Weights& w, size_t panel, const Rows& x, const size_t* at, size_t count, float* acc) {
    const PanelLayout layout(w.format, w.cols, w.group);
    const uint8_t* data = static_cast<const uint8_t*>(w.data) + panel * layout.bytes;
    const bool four = w.format == Format::int4 || w.format == Format::grouped4 || w.format == Format::grouped4_min;
    const bool own = w.format == Format::int8 || w.format == Format::int4;
    const bool has_min = w.format == Format::grouped8_min || w.format == Format::grouped4_min;
    const size_t cols = layout.chunks * chunk_cols, group = own ? block_cols : w.group;
    Slab slab;
    for (size_t first = 0; first < cols; first += slab_cols) {
        const size_t width = cols - first < slab_cols ? cols - first : slab_cols, after = first + width;
        Next next{{}, slab_cols * panel_rows / (four ? 2 : 1) / 64};
        for (size_t p = 0; p < P; ++p) {
            const uint8_t* from = data + p * layout.bytes;
            unpack<P>(w, from, layout, first, width, p, slab);
            next.at[p] = after < cols ? from + layout.values + after * panel_rows / (four ? 2 : 1) : from + P * layout.bytes;
        }
        for_tiles(count, P, next, [&](auto height, size_t row) {
            constexpr size_t R = decltype(height)::rows;
            const RowPointers rows = point_to(x, at, row, R);
            float* sums = acc + row * P * lanes;
            if (has_min) integer_tile<P, R, true>(slab, first, width, group, rows, sums);
            else integer_tile<P, R, false>(slab, first, width, group, rows, sums);
        });
    }
    if (!own) return;
    for (size_t m = 0; m < count * P; ++m) {
        const float* row_scale = reinterpret_cast<const float*>(data + m % P * layout.bytes);
        store(acc + m * lanes, mul(load(acc + m * lanes), load(row_scale)));
    }
}

#endif
// ---------------------------------------------------------------------------------------------------------------------

// Columns first .. first + cols of plain rows, in packed bfloat16's order.
inline void turn_rows(const Weights& w, size_t panel, size_t first, size_t cols, uint8_t* to) {
    const bf16* row[panel_rows];
    for (size_t r = 0; r < panel_rows; ++r)
        row[r] = static_cast<const bf16*>(w.data) + (panel * panel_rows + clamped(r, w.rows - panel * panel_rows)) * w.stride;
    for (size_t k = first; k < first + cols; k += tile_cols, to += tile_bytes) {
        f32x16 words[lanes];
        load_turned(row, k, w.cols - k, words);
        for (size_t j = 0; j < lanes; ++j) store(reinterpret_cast<float*>(to) + j * lanes, words[j]);
    }
}

// bfloat16 in its packed order: two chains for each tile of 32 k, whose sum goes to the totals in memory.
template <size_t P, size_t R>
inline void float_tile(const uint8_t* const* lines, size_t first, size_t cols, const RowPointers& x, float* acc) {
    for (size_t k = 0; k < cols; k += tile_cols) {
        f32x16 even[R][P], odd[R][P];
        for (size_t r = 0; r < R; ++r)
            for (size_t p = 0; p < P; ++p) even[r][p] = odd[r][p] = fill(0.0f);
#pragma GCC unroll 4
        for (size_t j = 0; j < tile_cols; j += 2) {
            f32x16 low[P], high[P];
            for (size_t p = 0; p < P; ++p) {
                const f32x16 words = load_words(lines[p] + (k + j) * panel_rows * 2, 64);
                low[p] = first_half(words), high[p] = second_half(words);
            }
            for (size_t r = 0; r < R; ++r) {
                const f32x16 a = fill(x.wide[r][first + k + j]), b = fill(x.wide[r][first + k + j + 1]);
                for (size_t p = 0; p < P; ++p) even[r][p] = fma(low[p], a, even[r][p]);
                for (size_t p = 0; p < P; ++p) odd[r][p] = fma(high[p], b, odd[r][p]);
            }
        }
        for (size_t r = 0; r < R; ++r) {
            for (size_t p = 0; p < P; ++p) {
                float* total = acc + (r * P + p) * panel_rows;
                store(total, add(load(total), add(even[r][p], odd[r][p])));
            }
        }
    }
}

// Packed bfloat16 is read where it lies; plain rows are transposed into the same order first.
template <size_t P>
inline void float_slabs(const Weights& w, size_t panel, const Rows& x, const size_t* at, size_t count, float* acc) {
    constexpr size_t most_tiles = sizeof(Slab::values) / tile_panels / tile_bytes;
    const size_t tiles = ceil_div(w.cols, tile_cols), bytes = tiles * tile_bytes;
    const bool plain = w.format == Format::bfloat16;
    Slab slab;
    for (size_t first = 0; first < tiles; first += most_tiles) {
        const size_t here = tiles - first < most_tiles ? tiles - first : most_tiles;
        const uint8_t* lines[P];
        Next next{{}, plain ? 0 : here * tile_bytes / 64};
        for (size_t p = 0; p < P; ++p) {
            uint8_t* turned = slab.values + p * most_tiles * tile_bytes;
            const uint8_t* packed = static_cast<const uint8_t*>(w.data) + (panel + p) * bytes + first * tile_bytes;
            if (plain) turn_rows(w, panel + p, first * tile_cols, here * tile_cols, turned);
            lines[p] = plain ? turned : packed;
            next.at[p] = packed + here * tile_bytes + (first + here < tiles ? 0 : (P - 1) * bytes);
        }
        for_tiles(count, P, next, [&](auto height, size_t row) {
            constexpr size_t R = decltype(height)::rows;
            float_tile<P, R>(lines, first * tile_cols, here * tile_cols, point_to(x, at, row, R), acc + row * P * lanes);
        });
    }
}

template <size_t P, typename Use>
inline void block_product(const Weights& w, size_t panel, const Rows& x, const size_t* at, size_t count, const Use& use) {
    alignas(64) float acc[block_rows * P * lanes];
    for (size_t i = 0; i < count * P; ++i) store(acc + i * lanes, fill(0.0f));
#if defined(__AVX512F__)
    if (x.wide == nullptr) integer_slabs<P>(w, panel, x, at, count, acc);
    else
#endif
        float_slabs<P>(w, panel, x, at, count, acc);
    for (size_t m = 0; m < count; ++m)
        for (size_t p = 0; p < P; ++p) use(panel + p, m, load(acc + (m * P + p) * lanes));
}

// use(panel, i, 16 sums) for `panels` (at most tile_panels) panels and the rows at[0..count) of x, at most block_rows.
template <typename Use>
inline void products(const Weights& w, size_t panel, size_t panels, const Rows& x, const size_t* at, size_t count,
                     const Use& use) {
#if defined(__AVX512F__)
    const bool few = count > 1 && count <= most_pair_rows && panels == pair_panels;
    if (few && x.wide == nullptr) return pair_products(w, panel, x, at, count, use);
#endif
    if (count > few_rows(w) && takes_many(w, x)) {
        if (panels == tile_panels) return block_product<tile_panels>(w, panel, x, at, count, use);
        return block_product<1>(w, panel, x, at, count, use);
    }
    for (size_t p = panel; p < panel + panels; ++p)
        panel_products(w, p, x, at, count, [&](size_t m, f32x16 y) { use(p, m, y); });
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
