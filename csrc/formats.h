// How packed weights lie in memory. src/nemotron_h/quantization/layout.py holds the same sizes in Python.
//
// A matrix [rows, cols] is cut into panels of 16 output rows, because a product keeps one row in each of 16 lanes. Rows
// are padded with zeros to 16 and columns to 64 (bfloat16: 32). A panel is one run of memory, read once from front to
// back:
//
//   own int8, int4   16 row scales (float32, powers of two)
//                    a code of one byte per row and 128 k: the block's scale, (1 + (c & 15)/16) · 2^((c >> 4) - 15)
//                    int4 only: multipliers 1..15 per row and 32 k, two in a byte (low nibble: the first 32 of 64 k),
//                    and their signs, 16 bits per 32 k: bit r set where row r's step is negative
//                    the values
//   grouped int8/4   a scale (float16 or bfloat16) per row and group of 32, 64 or 128 k
//                    perhaps a minimum (float32) per row and group
//                    the values
//   packed bfloat16  the values alone: of every 32 k a tile of 16 lines (1 KiB), line j the 16 rows' k = 2j and 2j + 1
//                    side by side: a word per lane, and the order in which the matrix units take their tiles
//
// The values begin at a multiple of 64 bytes. Integers of 64 k: for every four k the 16 rows' four bytes (64 B); nibbles
// hold k 0-3 of eight in their low and k 4-7 in their high halves. Own int4 is w = row · block · ±multiplier ·
// (nibble - 8): 4.22 bits. The sign lets the one value that -8 .. 7 has more on one side be on either: 5 % less error.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace nemotron_h {

constexpr size_t panel_rows = 16, block_cols = 128, chunk_cols = 64, multiplier_cols = 32;
constexpr size_t tile_cols = 32, tile_bytes = 1024;  // of packed bfloat16

constexpr size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }
constexpr size_t padded(size_t bytes) { return ceil_div(bytes, 64) * 64; }

// Offsets of a panel's parts.
struct PanelLayout {
    size_t chunks, blocks, scales, multipliers, signs, minimums, values, bytes;

    constexpr PanelLayout(Format format, size_t cols, size_t group)
        : chunks(ceil_div(cols, chunk_cols)), blocks(ceil_div(cols, block_cols)), scales(0), multipliers(0), signs(0),
          minimums(0), values(0), bytes(0) {
        if (format == Format::packed_bf16) {
            bytes = ceil_div(cols, tile_cols) * tile_bytes;
            return;
        }
        const bool four = format == Format::int4 || format == Format::grouped4 || format == Format::grouped4_min;
        const bool own = format == Format::int4 || format == Format::int8;
        const bool has_min = format == Format::grouped4_min || format == Format::grouped8_min;
        size_t at = 0;
        if (own) {
            scales = at += panel_rows * sizeof(float);  // codes, behind the row scales
            at += blocks * panel_rows;
            multipliers = at;
            if (four) {
                signs = at += chunks * panel_rows;
                at += chunks * 2 * sizeof(uint16_t);
            }
        } else {
            const size_t groups = ceil_div(chunks * chunk_cols, group);
            at += groups * panel_rows * sizeof(uint16_t);
            minimums = at;
            if (has_min) at += groups * panel_rows * sizeof(float);
        }
        values = at = padded(at);
        bytes = at + chunks * chunk_cols * panel_rows / (four ? 2 : 1);
    }
};

// Activations that meet these weights stay float32; otherwise they become int8 (kernels/activations.h).
constexpr bool takes_float(Format format, Arithmetic arithmetic) {
    const bool integers = format != Format::float32 && format != Format::bfloat16 && format != Format::packed_bf16;
    return !integers || arithmetic == Arithmetic::floating;
}

// Bytes for M rows of K activations: float32, or int8 with a scale per block of 128 and a sum per 32.
constexpr size_t sum_cols = 32;
constexpr size_t rows_bytes(size_t M, size_t K, bool wide) {
    const size_t blocks = ceil_div(K, block_cols), cols = blocks * block_cols;
    return wide ? padded(M * cols * 4) : padded(M * cols) + padded(M * blocks * 4) + padded(M * blocks * 16);
}

}  // namespace nemotron_h
