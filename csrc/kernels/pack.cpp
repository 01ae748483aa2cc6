// Packing: float32 rows to own int8, int4 or bfloat16 panels (formats.h), once, while a checkpoint is loaded.
//
// int8: a block of 128 gets the smallest scale on the grid of codes that reaches max|w| / 127.
// int4: a group of 32 has the step row · block · ±multiplier. The block's scale gives its largest group steps about
// max|w| / 7.5 with multipliers near 15; each group then tries the multipliers whose steps lie between max|w| / 9 and
// max|w| / 7, with both signs, and keeps the one with the least squared error: clipping one value is often better than a
// coarser step for 31 others. src/nemotron_h/quantization/own.py says the same in PyTorch, to the same bytes.
#include "product.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {
namespace {

constexpr size_t groups = block_cols / multiplier_cols, vectors = block_cols / lanes;
constexpr float inverse_most[2] = {1.0f / 127.0f, 1.0f / 112.5f};  // int8; int4: 15 · 7.5

union Word {
    float f;
    uint32_t u;
};
inline uint32_t word_of(float a) { return Word{a}.u; }
inline float float_of_word(uint32_t u) {
    Word w;
    w.u = u;
    return w.f;
}

// The power of two by which a row's largest block scale `most` becomes a value of the codes, at most 1 + 15/16.
inline float row_scale_of(float most) {
    uint32_t bits = word_of(most);
    bits += (1u << 19) - 1;          // whatever lies beyond 1 + 15/16 belongs to the next power
    const uint32_t exponent = bits >> 23;
    // Not below 2^-100: the steps of a row of zeros must be normal numbers.
    return float_of_word((exponent < 27 ? 27 : exponent > 254 ? 254 : exponent) << 23);
}

inline float code_value(uint32_t code) { return float_of_word((code << 19) + (112u << 23)); }

// The least code whose value is at least `a`, for 0 <= a <= 1 + 15/16.
inline uint32_t code_above(float a) {
    if (!(a > code_value(0))) return 0;
    return (word_of(a) - (112u << 23) + (1u << 19) - 1) >> 19;
}

// A block of a row: 128 values, zeros behind the last column.
struct Block {
    f32x16 v[vectors];
};

inline Block load_block(const float* w, size_t n) {
    Block block;
    for (size_t i = 0; i < vectors; ++i) block.v[i] = load_up_to(w + i * lanes, n > i * lanes ? n - i * lanes : 0);
    return block;
}

inline size_t left(size_t cols, size_t block) { return cols > block * block_cols ? cols - block * block_cols : 0; }

// The largest of the lanes, NaN if any of them is.
inline float largest(f32x16 a) {
    float v[lanes], best = 0.0f;
    store(v, a);
    for (size_t i = 0; i < lanes; ++i) best = v[i] > best || v[i] != v[i] ? v[i] : best;
    return best;
}

inline float largest_of(const f32x16* v, size_t count) {
    f32x16 most = fill(0.0f);
    for (size_t i = 0; i < count; ++i) most = max(abs(v[i]), most);
    return largest(most);
}

inline f32x16 nearest(f32x16 w, float inverse, float low, float high) {
    const f32x16 magic = fill(12582912.0f), t = min(fill(high), max(fill(low), mul(w, fill(inverse))));
    return sub(as_float(as_int(add(t, magic))), magic);
}

// The best multiplier of a group of 32, with its sign, and its values.
inline int pack_group(const f32x16* w, float scale, f32x16* q) {
    const float ratio = largest_of(w, 2) / scale;
    const float high = __builtin_ceilf(ratio * (1.0f / 7.0f)), low = __builtin_ceilf(ratio * (1.0f / 9.0f));
    const int last = high < 1.0f ? 1 : high > 15.0f ? 15 : static_cast<int>(high);
    const int first = low < 1.0f ? 1 : low > 15.0f ? 15 : static_cast<int>(low);
    int best = 0;
    float least = 0.0f;
    for (int m = first; m <= last; ++m) {
        for (int sign = 1; sign >= -1; sign -= 2) {
            const float step = scale * static_cast<float>(sign * m);  // exact: 5 bits times 4
            const f32x16 a = nearest(w[0], 1.0f / step, -8.0f, 7.0f), b = nearest(w[1], 1.0f / step, -8.0f, 7.0f);
            const f32x16 da = sub(w[0], mul(a, fill(step))), db = sub(w[1], mul(b, fill(step)));
            const float error = sum(add(mul(da, da), mul(db, db)));
            if (best == 0 || error < least) best = sign * m, least = error, q[0] = a, q[1] = b;
        }
    }
    return best;
}

// One row of a panel: its scale, codes, multipliers and values to their places.
bool pack_row(const float* w, size_t cols, Format format, const PanelLayout& layout, size_t row, uint8_t* panel) {
    const bool four = format == Format::int4;
    float most = 0.0f;
    for (size_t b = 0; b < layout.blocks; ++b) {
        const Block block = load_block(w + b * block_cols, left(cols, b));
        f32x16 invalid = fill(0.0f);  // NaN where a value is infinite or NaN
        for (size_t i = 0; i < vectors; ++i) invalid = fma(block.v[i], fill(0.0f), invalid);
        if (sum(invalid) != 0.0f) return false;
        const float block_most = largest_of(block.v, vectors);
        most = block_most > most ? block_most : most;
    }
    const float row_scale = row_scale_of(most * inverse_most[four]);
    __builtin_memcpy(panel + row * sizeof(float), &row_scale, sizeof row_scale);
    for (size_t b = 0; b < layout.blocks; ++b) {
        const Block block = load_block(w + b * block_cols, left(cols, b));
        const float wanted = largest_of(block.v, vectors) * inverse_most[four];
        const uint32_t code = code_above(wanted / row_scale);
        const float scale = row_scale * code_value(code);
        panel[layout.scales + b * panel_rows + row] = static_cast<uint8_t>(code);
        int8_t q[block_cols];
        f32x16 values[vectors];
        int multiplier[groups] = {};
        for (size_t g = 0; four && g < groups; ++g) multiplier[g] = pack_group(block.v + 2 * g, scale, values + 2 * g);
        for (size_t i = 0; !four && i < vectors; ++i) values[i] = nearest(block.v[i], 1.0f / scale, -127.0f, 127.0f);
        for (size_t i = 0; i < vectors; ++i) store(q + i * lanes, to_int(values[i]));
        for (size_t c = 2 * b; c < 2 * b + 2 && c < layout.chunks; ++c) {
            const int8_t* from = q + (c - 2 * b) * chunk_cols;
            uint8_t* to = panel + layout.values + c * (four ? 512 : 1024) + 4 * row;
            if (!four) {
                for (size_t k = 0; k < chunk_cols; ++k) to[k / 4 * 64 + k % 4] = static_cast<uint8_t>(from[k]);
                continue;
            }
            for (size_t k = 0; k < chunk_cols; k += 8)
                for (size_t i = 0; i < 4; ++i)
                    to[k / 8 * 64 + i] = static_cast<uint8_t>((from[k + i] + 8) | (from[k + 4 + i] + 8) << 4);
            const int* m = multiplier + 2 * (c - 2 * b);
            const int sizes = (m[0] < 0 ? -m[0] : m[0]) | (m[1] < 0 ? -m[1] : m[1]) << 4;
            panel[layout.multipliers + c * panel_rows + row] = static_cast<uint8_t>(sizes);
            uint8_t* signs = panel + layout.signs + 4 * c + row / 8;  // two masks of 16 bits, little-endian
            signs[0] = static_cast<uint8_t>(signs[0] | (m[0] < 0) << row % 8);
            signs[2] = static_cast<uint8_t>(signs[2] | (m[1] < 0) << row % 8);
        }
    }
    return true;
}

// One row of a bfloat16 panel, rounded to the nearest: words of two columns. Exact for weights that were bfloat16 before,
// subnormal ones too, since nothing here is arithmetic on floats. False if a value is, or becomes, infinite or NaN.
bool pack_bf16_row(const float* w, size_t cols, size_t row, size_t padded_cols, uint8_t* panel) {
    uint32_t invalid = 0;
    for (size_t k = 0; k < padded_cols; k += lanes) {
        bf16 narrow[lanes];
        store(narrow, load_up_to(w + k, cols > k ? cols - k : 0));
        for (size_t i = 0; i < lanes; i += 2) {
            const uint32_t low = narrow[i].bits, high = narrow[i + 1].bits;
            invalid |= ((low & 0x7f80) == 0x7f80) | ((high & 0x7f80) == 0x7f80);
            const uint32_t word = low | high << 16;
            __builtin_memcpy(panel + (k + i) / 2 * 64 + 4 * row, &word, sizeof word);
        }
    }
    return invalid == 0;
}

}  // namespace

bool pack(const float* w, size_t rows, size_t cols, Format format, void* panels) noexcept {
    const FlushSubnormals flush;
    const PanelLayout layout(format, cols, 0);
    int invalid = 0;
    parallel(ceil_div(rows, panel_rows), 1, [&](size_t begin, size_t end) {
        for (size_t panel = begin; panel < end; ++panel) {
            uint8_t* to = static_cast<uint8_t*>(panels) + panel * layout.bytes;
            for (size_t i = 0; i < layout.values; ++i) to[i] = 0;
            for (size_t r = 0; r < panel_rows; ++r) {
                const size_t row = panel * panel_rows + r;
                // A row beyond the last has no columns: it is packed as zeros.
                const size_t count = row < rows ? cols : 0;
                const bool ok = format == Format::packed_bf16
                                    ? pack_bf16_row(w + row * cols, count, r, ceil_div(cols, tile_cols) * tile_cols, to)
                                    : pack_row(w + row * cols, count, format, layout, r, to);
                if (!ok) __atomic_store_n(&invalid, 1, __ATOMIC_RELAXED);
            }
        }
    });
    return invalid == 0;
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
