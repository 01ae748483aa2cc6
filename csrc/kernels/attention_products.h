// The arithmetic of attention: what 32 rows of queries make of a tile of 32 keys, and of their values.
//
// A row is one query of one query head; all rows here share a key head, so a key is read and transposed once for all of
// them. What counts is to keep the multipliers fed:
//   scores   32 keys are transposed into lanes; a step takes one channel of 2 x 16 keys and of 8 rows, 16 chains.
//   values   lanes are channels; a step takes one key, 4 rows and 64 channels, 16 chains.
// score_panel and add_panel are all that a matrix unit would have to replace.
//
// Order of additions, by which the bits are fixed: a score is the sum, in order, of chains of fma over 32 channels; a
// channel of the values is one chain of fma over the keys of a block of 256.
#pragma once

#include "../kernels.h"
#include "../simd_rows.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {
namespace {

constexpr size_t block = 256, tile = 32, tiles = block / tile;
constexpr size_t chain = 32;  // channels; one chain over 128 of them errs twice as much, which a softmax magnifies
constexpr size_t panel = 32;  // rows; with a tile of keys their queries fill 32 KB, which is L1's
constexpr size_t max_size = attention_max_size;

// Registers: 16 chains of f32x16 fill half the file of AVX-512, 4 of them that of AVX2.
#if defined(__AVX512F__)
constexpr size_t score_rows = 8, score_vectors = 2, value_rows = 4, value_vectors = 4;
#else
constexpr size_t score_rows = 4, score_vectors = 1, value_rows = 4, value_vectors = 1;
#endif

constexpr float infinity = __builtin_inff();

inline size_t padded(size_t size) { return (size + lanes - 1) / lanes * lanes; }

// Floats of a transposed panel of queries, and of sixteen transposed keys: transpose_rows writes up to a multiple of 4
// channels, and the other 4 keep two of them from lying a multiple of 4 KB apart.
inline size_t queries_size(size_t size) { return (padded(size) + 4) * panel; }
inline size_t keys_size(size_t size) { return (padded(size) + 4) * lanes; }

// Memory that is needed next: every step of arithmetic asks for one line of it. A tile is too short for the hardware to
// notice where it continues, and too much to be asked for at once.
struct Ahead {
    const char *next, *end;

    template <typename T>
    static Ahead of(const T* first, size_t rows, size_t stride) {
        const char* p = reinterpret_cast<const char*>(first);
        return {p, p + rows * stride * sizeof(T)};
    }
    void step() {
        if (next >= end) return;
        __builtin_prefetch(next);
        next += 64;
    }
};

// scores[r][16 w + lane] = the dot product of row r and that key, for `score_vectors` times 16 keys.
//
// A step has one channel: 2 loads of keys, 8 broadcasts of queries (loads too, from one line), 16 multiply-adds. The
// multipliers take 8 cycles for that, and their latency is 4: there are enough chains.
template <size_t rows>
inline void dot(const float* q, const float* keys, size_t size, float* scores, Ahead& memory) {
    Ahead ahead = memory;
    const size_t next = keys_size(size);
    for (size_t c = 0; c < size;) {
        f32x16 acc[rows][score_vectors];
        for (size_t r = 0; r < rows; ++r)
            for (size_t w = 0; w < score_vectors; ++w) acc[r][w] = fill(0.0f);
        const bool first = c == 0;
        for (const size_t end = c + chain < size ? c + chain : size; c < end; ++c, q += panel, keys += lanes) {
            f32x16 k[score_vectors];
            for (size_t w = 0; w < score_vectors; ++w) k[w] = load(keys + w * next);
            ahead.step();
            for (size_t r = 0; r < rows; ++r) {
                const f32x16 channel = fill(q[r]);
                for (size_t w = 0; w < score_vectors; ++w) acc[r][w] = fma(channel, k[w], acc[r][w]);
            }
        }
        for (size_t r = 0; r < rows; ++r) {
            for (size_t w = 0; w < score_vectors; ++w) {
                float* score = scores + r * block + w * lanes;
                store(score, first ? acc[r][w] : add(load(score), acc[r][w]));
            }
        }
    }
    memory = ahead;
}

// scores[row][key] of up to a panel of rows, q [channel][row], and a tile of keys.
inline void score_panel(const float* q, const float* keys, size_t rows, size_t size, float* scores, Ahead& ahead) {
    for (size_t w = 0; w < tile / lanes; w += score_vectors) {
        const float* from = keys + w * keys_size(size);
        float* to = scores + w * lanes;
        size_t r = 0;
        for (; r + score_rows <= rows; r += score_rows) dot<score_rows>(q + r, from, size, to + r * block, ahead);
        if (score_rows > 4 && r + 4 <= rows) dot<4>(q + r, from, size, to + r * block, ahead), r += 4;
        for (; r < rows; ++r) dot<1>(q + r, from, size, to + r * block, ahead);
    }
}

// A tile of keys as [16 keys][channel][key], twice; it costs a fifth of what 16 rows then compute with it. Keys behind
// the last one are copies of it: nobody sees them.
template <typename T>
inline void transpose_keys(const T* k, size_t stride, size_t keys, size_t size, float* out) {
    for (size_t w = 0; w < tile; w += lanes, out += keys_size(size)) {
        const T* row[lanes];
        for (size_t i = 0; i < lanes; ++i) row[i] = k + (w + i < keys ? w + i : keys - 1) * stride;
        transpose_rows(row, size, out, lanes);
    }
}

// Infinity in the lanes whose bit is set, else -infinity.
inline f32x16 cap(uint32_t seen) { return either(seen, fill(infinity), fill(-infinity)); }

// Dot products of one row to weights exp(score - m), zero where unseen, over `used` tiles; stats: m, and the sum of the
// weights in sixteen chains (key mod 16), then sum(). A score is its dot product times factor, rounded only once m is
// taken off: a score of 100 has no digits beyond 1e-5, its distance to the largest has. By way of the cap a NaN turns
// into infinity where the key is seen (then m is infinite, and infinity - infinity NaN again, in `merge`) and into
// -infinity where it is not, as any score does. A row without a finite score leaves m = -infinity.
inline void weigh(float* scores, const float* factor, const uint32_t* seen, size_t used, float* stats) {
    f32x16 largest = fill(-infinity), sums = fill(0.0f);
    for (size_t i = 0; i < used * tile; i += lanes) {
        if (seen[i / tile] == 0) continue;
        const f32x16 s = min(mul(load(scores + i), load(factor + i)), cap(seen[i / tile] >> i % tile));
        largest = max(s, largest);
    }
    float each[lanes];
    store(each, largest);
    for (size_t half = lanes / 2; half > 0; half /= 2)
        for (size_t i = 0; i < half; ++i) each[i] = each[i + half] > each[i] ? each[i + half] : each[i];
    const float m = each[0];
    for (size_t i = 0; i < used * tile; i += lanes) {
        f32x16 p = fill(0.0f);
        if (seen[i / tile] != 0) {
            const f32x16 x = fma(load(scores + i), load(factor + i), fill(-m));
            const f32x16 capped = min(x, cap(seen[i / tile] >> i % tile));
            p = exp_or_zero(min(capped, fill(1.0f)));  // x may be above zero by m's own rounding
            sums = add(sums, p);
        }
        store(scores + i, p);
    }
    stats[0] = m;
    stats[1] = sum(sums);
}

// Values of a tile as floats [key][channel], times their scales; zero where the key's bit is not set, so that what lies
// in an unseen slot, NaN included, meets no weight. `check`: returns whether all are finite, so that a weight of zero
// would hide them; a chain of additions, and only few tiles need to know.
template <bool check, typename T>
inline bool widen_values(const T* v, size_t stride, const float* scale, size_t size, uint32_t seen, float* out) {
    const size_t full = size / lanes * lanes, width = padded(size);
    f32x16 odd = fill(0.0f);  // a NaN once anything is not finite
    for (size_t key = 0; key < tile; ++key, out += width) {
        if ((seen >> key & 1) == 0) {
            for (size_t c = 0; c < width; c += lanes) store(out + c, fill(0.0f));
            continue;
        }
        const T* row = v + key * stride;
        const f32x16 by = fill(scale == nullptr ? 1.0f : scale[key]);
        auto put = [&](size_t c, f32x16 x) {
            if (scale != nullptr) x = mul(x, by);
            if (check) odd = fma(x, fill(0.0f), odd);
            store(out + c, x);
        };
        for (size_t c = 0; c < full; c += lanes) put(c, load(row + c));
        if (full < size) put(full, load(row + full, size - full));
    }
    return !check || mask_at_least(odd, fill(0.0f)) == 0xffff;
}

// acc[r][channel] += weights[r][key] · values[key][channel] over a tile of keys, for 16 · `width` channels.
//
// A step has one key: 4 loads of values, 4 broadcasts of weights, 16 multiply-adds. The sums live in registers for a
// tile and in a cache between tiles.
template <size_t rows, size_t width>
inline void add_values(const float* weights, const float* values, size_t stride, float* acc, Ahead& memory) {
    Ahead ahead = memory;
    f32x16 sums[rows][width];
    for (size_t r = 0; r < rows; ++r)
        for (size_t w = 0; w < width; ++w) sums[r][w] = load(acc + r * stride + w * lanes);
    for (size_t key = 0; key < tile; ++key, values += stride) {
        f32x16 v[width];
        for (size_t w = 0; w < width; ++w) v[w] = load(values + w * lanes);
        ahead.step();
        for (size_t r = 0; r < rows; ++r) {
            const f32x16 p = fill(weights[r * block + key]);
            for (size_t w = 0; w < width; ++w) sums[r][w] = fma(p, v[w], sums[r][w]);
        }
    }
    for (size_t r = 0; r < rows; ++r)
        for (size_t w = 0; w < width; ++w) store(acc + r * stride + w * lanes, sums[r][w]);
    memory = ahead;
}

// All channels, padding included: values are zero there.
template <size_t rows>
inline void add_rows(const float* weights, const float* values, size_t stride, float* acc, Ahead& ahead) {
    size_t c = 0;
    for (; c + value_vectors * lanes <= stride; c += value_vectors * lanes)
        add_values<rows, value_vectors>(weights, values + c, stride, acc + c, ahead);
    for (; c < stride; c += lanes) add_values<rows, 1>(weights, values + c, stride, acc + c, ahead);
}

inline void add_panel(const float* weights, const float* values, size_t rows, size_t stride, float* acc, Ahead& ahead) {
    size_t r = 0;
    for (; r + value_rows <= rows; r += value_rows)
        add_rows<value_rows>(weights + r * block, values, stride, acc + r * stride, ahead);
    for (; r < rows; ++r) add_rows<1>(weights + r * block, values, stride, acc + r * stride, ahead);
}

}  // namespace
}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
