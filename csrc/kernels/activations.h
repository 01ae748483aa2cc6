// The rows of x that meet a weight matrix, put in the form that the products of product.h read.
//
// Packed weights take int8 with one float32 scale for each block of 128 k: s = max|x| / 127, q = x / s to the nearest. The
// last block may be half (64 k). Beside them stand the sums of q over 32 k, which undo the offset of unsigned weights.
// Plain weights, and packed ones with floating arithmetic, take float32. Both are padded with zeros to whole blocks.
// A row costs a microsecond or less; its matrix costs a hundred. So it is made by the op itself, at its start.
#pragma once

#include "../formats.h"
#include "../pool.h"
#include "../simd_int.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {

struct Rows {
    size_t cols;           // padded to block_cols
    float* wide;           // [M][cols], or null
    int8_t* q;             // [M][cols], or null
    float* scales;         // [M][cols / 128]
    int32_t* sums;         // [M][cols / 32]
    bf16* narrow = nullptr;  // [M][cols], or null: for matrix units alone (tile_rows.h), without `wide`

    size_t blocks() const { return cols / block_cols; }
    size_t width() const { return wide != nullptr ? sizeof(float) : narrow != nullptr ? sizeof(bf16) : 1; }
    Rows from(size_t m) const {
        if (narrow != nullptr) return {cols, nullptr, nullptr, nullptr, nullptr, narrow + m * cols};
        if (wide != nullptr) return {cols, wide + m * cols, nullptr, nullptr, nullptr};
        return {cols, nullptr, q + m * cols, scales + m * blocks(), sums + m * (cols / sum_cols)};
    }
};

// `narrow`: float rows that came as bfloat16 stay so, in the place of wide ones.
inline Rows place_rows(size_t M, size_t K, bool wide, char*& scratch, bool narrow = false) {
    Rows rows{ceil_div(K, block_cols) * block_cols, nullptr, nullptr, nullptr, nullptr};
    auto take = [&](size_t bytes) {
        char* at = scratch;
        scratch += padded(bytes);
        return static_cast<void*>(at);
    };
    if (narrow) {
        rows.narrow = static_cast<bf16*>(take(M * rows.cols * sizeof(bf16)));
    } else if (wide) {
        rows.wide = static_cast<float*>(take(M * rows.cols * 4));
    } else {
        rows.q = static_cast<int8_t*>(take(M * rows.cols));
        rows.scales = static_cast<float*>(take(M * rows.blocks() * 4));
        rows.sums = static_cast<int32_t*>(take(M * rows.blocks() * 16));
    }
    return rows;
}

template <typename X>
inline f32x16 load_up_to(const X* p, size_t n) {
    return n >= lanes ? load(p) : n == 0 ? fill(0.0f) : load(p, n);
}

// One block of 128 values to int8. A block that holds an infinity or a NaN gets the scale NaN: it must not vanish.
template <typename X>
inline void quantize_block(const X* x, size_t n, int8_t* q, float* scale, int32_t* sums) {
    constexpr size_t vectors = block_cols / lanes;
    f32x16 v[vectors], most = fill(0.0f), invalid = fill(0.0f);
    for (size_t i = 0; i < vectors; ++i) {
        v[i] = load_up_to(x + i * lanes, n > i * lanes ? n - i * lanes : 0);
        most = max(abs(v[i]), most);
        invalid = fma(v[i], fill(0.0f), invalid);  // NaN for infinities and NaNs, else zero
    }
    const float bad = sum(invalid), most_of_all = bad == 0.0f ? greatest(most) : 0.0f;
    const float top = most_of_all > 1e-36f ? most_of_all : 0.0f;  // below, 127 / top would be infinite
    *scale = bad == 0.0f ? top * (1.0f / 127.0f) : bad;
    const f32x16 inverse = fill(top > 0.0f ? 127.0f / top : 0.0f), magic = fill(12582912.0f);
    for (size_t i = 0; i < vectors; ++i) {
        // To the nearest integer by the rounding of an addition; its low bits are the integer (see exp in simd.h).
        const f32x16 t = bad == 0.0f ? min(fill(127.0f), max(fill(-127.0f), mul(v[i], inverse))) : fill(0.0f);
        v[i] = sub(as_float(as_int(add(t, magic))), magic);
        store(q + i * lanes, to_int(v[i]));
    }
    constexpr size_t per_sum = sum_cols / lanes;
    static_assert(per_sum == 2, "as many vectors as are added below");
    for (size_t g = 0; g < block_cols / sum_cols; ++g)  // of whole numbers, exact as floats
        sums[g] = static_cast<int32_t>(sum(add(v[per_sum * g], v[per_sum * g + 1])));
}

template <typename X>
inline void prepare_row(const X* x, size_t K, const Rows& rows, size_t m) {
    if (rows.narrow != nullptr) {
        bf16* to = rows.narrow + m * rows.cols;
        for (size_t c = 0; c < rows.cols; c += lanes) store(to + c, load_up_to(x + c, K > c ? K - c : 0));
        return;
    }
    if (rows.wide != nullptr) {
        float* to = rows.wide + m * rows.cols;
        for (size_t c = 0; c < rows.cols; c += lanes) store(to + c, load_up_to(x + c, K > c ? K - c : 0));
        return;
    }
    for (size_t b = 0; b < rows.blocks(); ++b) {
        const size_t at = m * rows.blocks() + b;
        quantize_block(x + b * block_cols, K - b * block_cols, rows.q + m * rows.cols + b * block_cols, rows.scales + at,
                       rows.sums + 4 * at);
    }
}

template <typename X>
inline void prepare_rows(const X* x, size_t stride, size_t M, size_t K, const Rows& rows) {
    const size_t grain = ceil_div(16384, K);  // a few microseconds
    parallel(M, grain, [&](size_t begin, size_t end) {
        for (size_t m = begin; m < end; ++m) prepare_row(x + m * stride, K, rows, m);
    });
}

inline void prepare_rows(const void* x, Dtype dtype, size_t stride, size_t M, size_t K, const Rows& rows) {
    if (dtype == Dtype::float32) prepare_rows(static_cast<const float*>(x), stride, M, K, rows);
    else prepare_rows(static_cast<const bf16*>(x), stride, M, K, rows);
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
