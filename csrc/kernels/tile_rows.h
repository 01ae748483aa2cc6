// The product of two panels with many rows of activations on the matrix units (tiles.h), with the bits of
// many_rows.h. A core has 8 to 16 times as many multipliers there, so all else must happen beside them.
//
// A step is 32 rows by 2 panels by one group of k: two tiles of activations, read where activations.h has put them, meet
// two of weights, and four of sums fill the other registers. int4 becomes int8 once for all rows of a block, in slabs of
// 512 k, whose lanes (an output each) of four k are what a tile of weights wants. There are two slabs: while one is
// multiplied, the next is unpacked, a piece after every step, and the one behind it fetched. Sums of integers go through
// 4 KB of the first cache to become floats, one group behind the products, so that both kinds of unit are busy.
//
// Why the bits are the same: integers are exact within a group, and the floats see the operations of product.h in its
// order. bfloat16 was given the order of the units from the start; its sums stay in their tiles for a slab of 256 k. That
// holds for rows that came as bfloat16; float32 rows, and the activations between experts' two matrices, which are not
// rounded, are no operands of the units and take many_rows.h.
//
// Groups of 32 k with a float scale each take many_rows.h as well: a tile's sums would have to become floats after every
// half product, which costs more than the product. Groups of 64 gain a little, those of 128 are as our own formats.
#pragma once

#include "many_rows.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {

// Rows from which the units are used. Fewer wait for memory, which product.h reads once, or for one pair of tiles.
constexpr size_t rows_for_tiles = 9;

#if defined(NEMOTRON_H_TILES)
constexpr bool has_tiles = true;

// Whether activations stay bfloat16. All their products then are made of tiles, also those of an expert's single visitor.
inline bool keeps_bf16(Format format, Dtype x, size_t M) {
    return x == Dtype::bfloat16 && M >= rows_for_tiles && (format == Format::bfloat16 || format == Format::packed_bf16);
}

inline bool takes_tiles(const Weights& w, const Rows& x, size_t count) {
    if (x.narrow != nullptr) return true;
    const bool own = w.format == Format::int8 || w.format == Format::int4;
    return x.q != nullptr && count >= rows_for_tiles && (own || w.group >= chunk_cols);
}

constexpr size_t tile_slab = 512;  // columns; of bfloat16 half as many
constexpr size_t pair_rows = 2 * tile_height;

// Two of them lie side by side. Were they a multiple of 4 KB apart, what is stored to one would hold up loads of the other.
struct TileSlab {
    alignas(64) uint8_t values[2][tile_slab * panel_rows];                // [panel][four k][row][k]: a tile in each KB
    alignas(64) float scales[2][tile_slab / chunk_cols * panel_rows];    // [panel][group][row]
    alignas(64) float minimums[2][tile_slab / chunk_cols * panel_rows];
};
static_assert(sizeof(TileSlab) % 4096 == 2048, "as far apart as can be");

// Tiles of rows. The last one begins 16 rows before the end, so that it reads nothing beyond: rows that it shares with the
// one before it are multiplied twice and used once. Fewer than 16 rows are one tile of that height.
struct RowTiles {
    size_t count, tiles;
    explicit RowTiles(size_t rows) : count(rows), tiles(ceil_div(rows, tile_height)) {}
    size_t height() const { return count < tile_height ? count : tile_height; }
    size_t first(size_t t) const { return t + 1 < tiles || count < tile_height ? t * tile_height : count - tile_height; }
    size_t of_row(size_t m) const { return m / tile_height * tile_height + m - first(m / tile_height); }  // where its sums are
};

// ---------------------------------------------------------------------------------------------------------------------
// Integers.

struct Panels {
    const Weights& w;
    PanelLayout layout;
    const uint8_t* data;
    size_t group;
    bool four, own, has_min;

    Panels(const Weights& w, size_t panel)
        : w(w), layout(w.format, w.cols, w.group),
          data(static_cast<const uint8_t*>(w.data) + panel * layout.bytes),
          four(w.format == Format::int4 || w.format == Format::grouped4 || w.format == Format::grouped4_min),
          own(w.format == Format::int8 || w.format == Format::int4),
          has_min(w.format == Format::grouped8_min || w.format == Format::grouped4_min) {
        group = own ? block_cols : w.group;
    }
    size_t cols() const { return layout.chunks * chunk_cols; }
    size_t bytes(size_t cols) const { return cols * panel_rows / (four ? 2 : 1); }
    const uint8_t* values(size_t p, size_t k) const { return data + p * layout.bytes + layout.values + bytes(k); }
};

// 32 columns of a panel, from k on, to signed bytes at `to`.
inline void unpack_piece(const Panels& panels, size_t p, size_t k, uint8_t* to) {
    const uint8_t* from = panels.values(p, k);
    if (!panels.four) {
        for (size_t i = 0; i < 8; ++i) store(to + 64 * i, load_bytes(from + 64 * i));
        return;
    }
    Multiplier m{};
    const uint8_t* panel = panels.data + p * panels.layout.bytes;
    if (panels.own) m = multiplier<false>(multipliers(panel, panels.layout, k / chunk_cols, k / multiplier_cols % 2));
    for (size_t i = 0; i < 4; ++i, to += 128) {
        const bytes64 w = load_bytes(from + 64 * i), low = low_nibbles(w), high = high_nibbles(w);
        store(to, panels.own ? times(low, m) : panels.has_min ? low : minus_eight(low));
        store(to + 64, panels.own ? times(high, m) : panels.has_min ? high : minus_eight(high));
    }
}

// A slab in the making, piece by piece.
template <size_t P>
struct Ahead {
    const Panels& panels;
    size_t first, pieces, done;
    TileSlab* slab;

    Ahead(const Panels& panels, size_t first, TileSlab* slab) : panels(panels), first(first), done(0), slab(slab) {
        const size_t left = panels.cols() - first;
        pieces = (left < tile_slab ? left : tile_slab) / multiplier_cols * P;
    }

    // Up to the share of so many steps that have been made.
    void proceed(size_t step, size_t steps) {
        for (const size_t end = step * pieces / steps; done < end; ++done) piece(done / P * multiplier_cols, done % P);
    }

    void piece(size_t k, size_t p) {
        if (k % panels.group == 0) scales_of(k, p);
        unpack_piece(panels, p, first + k, slab->values[p] + k * panel_rows);
        // What the slab after this one needs; behind the last, what the next two panels begin with.
        const bool last = first + tile_slab >= panels.cols();
        const uint8_t* later = last ? panels.data + (P + p) * panels.layout.bytes + panels.bytes(k)
                                    : panels.values(p, first + tile_slab + k);
        for (size_t i = 0; i < panels.bytes(multiplier_cols); i += 64) prefetch(later + i);
    }

    void scales_of(size_t k, size_t p) {
        const size_t g = (first + k) / panels.group, to = k / panels.group * panel_rows;
        const uint8_t* panel = panels.data + p * panels.layout.bytes;
        store(slab->scales[p] + to, panels.own ? block_scales(panel + panels.layout.scales + g * panel_rows)
                                               : group_scales(panel, g, panels.w.scale_type));
        if (!panels.has_min) return;
        store(slab->minimums[p] + to, load(reinterpret_cast<const float*>(panel + panels.layout.minimums) + g * panel_rows));
    }
};

// Products of `tiles` tiles of k: C = A · B for A's 16 or (R = 2) 32 rows, to sums[tile of rows][panel][row][16].
template <size_t R, size_t P>
inline void multiply_bytes(const int8_t* const* a, size_t stride, const uint8_t* const* b, size_t tiles) {
    tile_zero<0>();
    if constexpr (P == 2) tile_zero<1>();
    if constexpr (R == 2) tile_zero<2>();
    if constexpr (R == 2 && P == 2) tile_zero<3>();
    for (size_t i = 0; i < tiles; ++i) {
        tile_load<tile_b>(b[0] + i * tile_bytes, tile_width);
        tile_load<tile_a>(a[0] + i * tile_width, stride);
        tile_dot_bytes<0, tile_a, tile_b>();
        if constexpr (P == 2) {
            tile_load<tile_b + 1>(b[1] + i * tile_bytes, tile_width);
            tile_dot_bytes<1, tile_a, tile_b + 1>();
        }
        if constexpr (R == 2) {
            tile_load<tile_a + 1>(a[1] + i * tile_width, stride);
            tile_dot_bytes<2, tile_a + 1, tile_b>();
        }
        if constexpr (R == 2 && P == 2) tile_dot_bytes<3, tile_a + 1, tile_b + 1>();
    }
}

// Sums of one group whose conversion to floats is still to come.
struct Group {
    size_t rows = 0;             // tiles of rows; 0: there is none
    const float *scales[2], *minimums[2];
    const float* x_scales[2];    // of the tiles' first rows, at the group's block
    const int32_t* x_sums[2];    // and at its first 32 k
    size_t x_sum_count;
    float* totals;               // [tile of rows][row][panel][16]
};

template <size_t P, bool has_min>
inline void convert(const Group& g, const Rows& x, size_t height, const int32_t* sums) {
    if (g.rows == 0) return;
    f32x16 scale[P], low[P];
    for (size_t p = 0; p < P; ++p) {
        scale[p] = load(g.scales[p]);
        if constexpr (has_min) low[p] = load(g.minimums[p]);
    }
    for (size_t t = 0; t < g.rows; ++t) {
        for (size_t r = 0; r < height; ++r) {
            const f32x16 x_scale = fill(g.x_scales[t][r * x.blocks()]);
            [[maybe_unused]] f32x16 x_sum = x_scale;
            if constexpr (has_min) {
                int32_t sum = 0;
                for (size_t i = 0; i < g.x_sum_count; ++i) sum += g.x_sums[t][r * (x.cols / sum_cols) + i];
                x_sum = mul(to_float(fill_int(sum)), x_scale);
            }
            for (size_t p = 0; p < P; ++p) {
                float* total = g.totals + ((t * tile_height + r) * P + p) * lanes;
                const f32x16 dot = to_float({_mm512_load_si512(sums + ((t * 2 + p) * tile_height + r) * lanes)});
                f32x16 y = fma(dot, mul(x_scale, scale[p]), load(total));
                if constexpr (has_min) y = fma(x_sum, low[p], y);
                store(total, y);
            }
        }
    }
}

template <size_t R, size_t P>
inline void store_sums(int32_t* sums) {
    constexpr size_t tile = tile_height * lanes;
    tile_store<0>(sums, tile_width);
    if constexpr (P == 2) tile_store<1>(sums + tile, tile_width);
    if constexpr (R == 2) tile_store<2>(sums + 2 * tile, tile_width);
    if constexpr (R == 2 && P == 2) tile_store<3>(sums + 3 * tile, tile_width);
}

template <size_t P, bool has_min>
inline void tile_integers(const Panels& panels, const Rows& x, const RowTiles& rows, float* acc) {
    const size_t cols = panels.cols(), group = panels.group, height = rows.height(), pairs = ceil_div(rows.tiles, 2);
    TileSlab slabs[2];
    alignas(64) int32_t sums[4 * tile_height * lanes];
    Ahead<P>(panels, 0, &slabs[0]).proceed(1, 1);
    Group before;
    for (size_t first = 0, n = 0; first < cols; first += tile_slab, ++n) {
        const TileSlab& slab = slabs[n % 2];
        const size_t width = cols - first < tile_slab ? cols - first : tile_slab, after = first + width;
        const size_t groups = ceil_div(width, group), steps = pairs * groups;
        Ahead<P> ahead(panels, after, &slabs[(n + 1) % 2]);
        for (size_t step = 0; step < steps; ++step) {
            const size_t pair = step / groups, i = step % groups, k = i * group;
            const size_t here = width - k < group ? width - k : group, tiles = here / chunk_cols;
            Group now;
            now.rows = rows.tiles - 2 * pair < 2 ? 1 : 2;
            const int8_t* a[2];
            const uint8_t* b[2];
            for (size_t t = 0; t < now.rows; ++t) {
                const size_t row = rows.first(2 * pair + t), column = first + k;
                a[t] = x.q + row * x.cols + column;
                now.x_scales[t] = x.scales + row * x.blocks() + column / block_cols;
                now.x_sums[t] = x.sums + (row * x.cols + column) / sum_cols;
            }
            for (size_t p = 0; p < P; ++p) {
                b[p] = slab.values[p] + k * panel_rows;
                now.scales[p] = slab.scales[p] + i * panel_rows;
                now.minimums[p] = slab.minimums[p] + i * panel_rows;
            }
            now.x_sum_count = here / sum_cols;
            now.totals = acc + pair * pair_rows * P * lanes;
            if (now.rows == 2) multiply_bytes<2, P>(a, x.cols, b, tiles);
            else multiply_bytes<1, P>(a, x.cols, b, tiles);
            convert<P, has_min>(before, x, height, sums);  // while the units multiply this group
            ahead.proceed(step + 1, steps);
            if (now.rows == 2) store_sums<2, P>(sums);
            else store_sums<1, P>(sums);
            before = now;
        }
    }
    convert<P, has_min>(before, x, height, sums);
    if (!panels.own) return;
    for (size_t i = 0; i < rows.tiles * tile_height * P; ++i) {
        const float* row_scale = reinterpret_cast<const float*>(panels.data + i % P * panels.layout.bytes);
        store(acc + i * lanes, mul(load(acc + i * lanes), load(row_scale)));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// bfloat16.

// Adds the products of `tiles` tiles of k to totals[tile of rows][row][panel][16].
template <size_t R, size_t P>
inline void multiply_bf16(const bf16* const* a, size_t stride, const uint8_t* const* b, size_t tiles, float* totals) {
    constexpr size_t distance = P * lanes * sizeof(float);
    float* const lower = totals + tile_height * P * lanes;
    tile_load<0>(totals, distance);
    if constexpr (P == 2) tile_load<1>(totals + lanes, distance);
    if constexpr (R == 2) tile_load<2>(lower, distance);
    if constexpr (R == 2 && P == 2) tile_load<3>(lower + lanes, distance);
    for (size_t i = 0; i < tiles; ++i) {
        tile_load<tile_b>(b[0] + i * tile_bytes, tile_width);
        tile_load<tile_a>(a[0] + i * tile_cols, stride);
        tile_dot_bf16<0, tile_a, tile_b>();
        if constexpr (P == 2) {
            tile_load<tile_b + 1>(b[1] + i * tile_bytes, tile_width);
            tile_dot_bf16<1, tile_a, tile_b + 1>();
        }
        if constexpr (R == 2) {
            tile_load<tile_a + 1>(a[1] + i * tile_cols, stride);
            tile_dot_bf16<2, tile_a + 1, tile_b>();
        }
        if constexpr (R == 2 && P == 2) tile_dot_bf16<3, tile_a + 1, tile_b + 1>();
    }
    tile_store<0>(totals, distance);
    if constexpr (P == 2) tile_store<1>(totals + lanes, distance);
    if constexpr (R == 2) tile_store<2>(lower, distance);
    if constexpr (R == 2 && P == 2) tile_store<3>(lower + lanes, distance);
}

// Packed panels are read where they lie; plain rows are put in their order first.
template <size_t P>
inline void tile_floats(const Weights& w, size_t panel, const Rows& x, const RowTiles& rows, float* acc) {
    constexpr size_t most = tile_slab / 2 / tile_cols;
    const size_t tiles = ceil_div(w.cols, tile_cols), bytes = tiles * tile_bytes, pairs = ceil_div(rows.tiles, 2);
    const bool plain = w.format == Format::bfloat16;
    alignas(64) uint8_t turned[P][most * tile_bytes];
    for (size_t first = 0; first < tiles; first += most) {
        const size_t here = tiles - first < most ? tiles - first : most, lines = plain ? 0 : here * tile_bytes / 64;
        const uint8_t *b[2], *next[2];
        for (size_t p = 0; p < P; ++p) {
            const uint8_t* packed = static_cast<const uint8_t*>(w.data) + (panel + p) * bytes + first * tile_bytes;
            if (plain) turn_rows(w, panel + p, first * tile_cols, here * tile_cols, turned[p]);
            b[p] = plain ? turned[p] : packed;
            next[p] = packed + here * tile_bytes + (first + here < tiles ? 0 : (P - 1) * bytes);
        }
        for (size_t pair = 0; pair < pairs; ++pair) {
            const bool two = rows.tiles - 2 * pair >= 2;
            const bf16* a[2];
            for (size_t t = 0; t < (two ? 2 : 1); ++t)
                a[t] = x.narrow + rows.first(2 * pair + t) * x.cols + first * tile_cols;
            float* totals = acc + pair * pair_rows * P * lanes;
            if (two) multiply_bf16<2, P>(a, x.cols * sizeof(bf16), b, here, totals);
            else multiply_bf16<1, P>(a, x.cols * sizeof(bf16), b, here, totals);
            for (size_t p = 0; p < P; ++p)
                for (size_t i = pair * lines / pairs; i < (pair + 1) * lines / pairs; ++i) prefetch(next[p] + 64 * i);
        }
    }
}

// use(panel, i, 16 sums) for P panels and `count` rows of x, at most block_rows.
template <size_t P, typename Use>
inline void tile_product(const Weights& w, size_t panel, const Rows& x, size_t count, const Use& use) {
    const RowTiles rows(count);
    static_assert(tile_panels == 2, "as many as an item of work has");
    alignas(64) float acc[block_rows * P * lanes];
    for (size_t i = 0; i < rows.tiles * tile_height * P; ++i) store(acc + i * lanes, fill(0.0f));
    {
        const Tiles tiles(rows.height());
        if (x.narrow != nullptr) {
            tile_floats<P>(w, panel, x, rows, acc);
        } else {
            const Panels panels(w, panel);
            if (panels.has_min) tile_integers<P, true>(panels, x, rows, acc);
            else tile_integers<P, false>(panels, x, rows, acc);
        }
    }
    for (size_t m = 0; m < count; ++m)
        for (size_t p = 0; p < P; ++p) use(panel + p, m, load(acc + (rows.of_row(m) * P + p) * lanes));
}

#else

constexpr bool has_tiles = false;
constexpr bool keeps_bf16(Format, Dtype, size_t) { return false; }

#endif

// Copies of the rows order[0 .. count) of x, one after the other.
inline void gather_rows(const Rows& x, const size_t* order, size_t count, const Rows& to) {
    parallel(count, ceil_div(32768, x.cols), [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
            const Rows from = x.from(order[i]), at = to.from(i);
            if (x.wide != nullptr) __builtin_memcpy(at.wide, from.wide, x.cols * sizeof(float));
            if (x.narrow != nullptr) __builtin_memcpy(at.narrow, from.narrow, x.cols * sizeof(bf16));
            if (x.q == nullptr) continue;
            __builtin_memcpy(at.q, from.q, x.cols);
            __builtin_memcpy(at.scales, from.scales, x.blocks() * sizeof(float));
            __builtin_memcpy(at.sums, from.sums, x.cols / sum_cols * sizeof(int32_t));
        }
    });
}

// products() of many_rows.h, on the matrix units where they serve: a tile load takes rows at one distance, so no `at`.
template <typename Use>
inline void products_by_any(const Weights& w, size_t panel, size_t panels, const Rows& x, const size_t* at, size_t count,
                            const Use& use) {
#if defined(NEMOTRON_H_TILES)
    if (at == nullptr && takes_tiles(w, x, count)) {
        if (panels == 2) return tile_product<2>(w, panel, x, count, use);
        return tile_product<1>(w, panel, x, count, use);
    }
#endif
    products(w, panel, panels, x, at, count, use);
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
