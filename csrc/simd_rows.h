// Sixteen rows of memory turned into vectors that hold one column each.
//
// A dot product along a row would end in a sum across lanes. With sixteen rows in the sixteen lanes there is none, and
// each lane adds in the order of the columns. The transposition moves words of 32 bits, so it costs half as much for
// bfloat16 and a quarter for bytes: a word that holds two or four columns is taken apart afterwards.
#pragma once

#include "simd.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {

// ---------------------------------------------------------------------------------------------------------------------
#if defined(__AVX512F__)

// Sixteen words from n <= 64 bytes of memory; the missing ones are zero.
inline f32x16 load_words(const void* p, size_t n) {
    if (n == 64) return {_mm512_loadu_ps(p)};
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi8((uint64_t{1} << n) - 1, p))};
}

// r[i], lane j <-> r[j], lane i: pairs of words, pairs of pairs, then the four quarters of a register, twice.
inline void transpose(f32x16 (&r)[lanes]) {
    __m512 pair[16], quad[16];
    for (int i = 0; i < 16; i += 2) {
        pair[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
        pair[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
    }
    auto low = [](__m512 a, __m512 b) {
        return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
    auto high = [](__m512 a, __m512 b) {
        return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
    for (int i = 0; i < 16; i += 4) {
        quad[i] = low(pair[i], pair[i + 2]);
        quad[i + 1] = high(pair[i], pair[i + 2]);
        quad[i + 2] = low(pair[i + 1], pair[i + 3]);
        quad[i + 3] = high(pair[i + 1], pair[i + 3]);
    }
    for (int c = 0; c < 4; ++c) {
        const __m512 a = _mm512_shuffle_f32x4(quad[c], quad[4 + c], 0x44);
        const __m512 b = _mm512_shuffle_f32x4(quad[c], quad[4 + c], 0xee);
        const __m512 d = _mm512_shuffle_f32x4(quad[8 + c], quad[12 + c], 0x44);
        const __m512 e = _mm512_shuffle_f32x4(quad[8 + c], quad[12 + c], 0xee);
        r[c].v = _mm512_shuffle_f32x4(a, d, 0x88);
        r[4 + c].v = _mm512_shuffle_f32x4(a, d, 0xdd);
        r[8 + c].v = _mm512_shuffle_f32x4(b, e, 0x88);
        r[12 + c].v = _mm512_shuffle_f32x4(b, e, 0xdd);
    }
}

// The first or second bfloat16 of every word.
inline f32x16 first_half(f32x16 w) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(w.v), 16))}; }
inline f32x16 second_half(f32x16 w) {
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(w.v), mask))};
}
// The k-th signed byte of every word.
template <int k>
inline f32x16 signed_byte(f32x16 w) {
    const __m512i top = _mm512_slli_epi32(_mm512_castps_si512(w.v), 24 - 8 * k);
    return {_mm512_cvtepi32_ps(_mm512_srai_epi32(top, 24))};
}

inline f32x16 load(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline f32x16 load(const int8_t* p, size_t n) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)))};
}

// a, but zero where x < bound; a NaN in x keeps a.
inline f32x16 zero_below(f32x16 a, f32x16 x, f32x16 bound) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, bound.v, _CMP_NLT_UQ), a.v)};
}

// ---------------------------------------------------------------------------------------------------------------------
#elif defined(__AVX2__)

inline f32x16 load_words(const void* p, size_t n) {
    if (n == 64) return load(static_cast<const float*>(p));
    float words[lanes] = {};
    __builtin_memcpy(words, p, n);
    return load(words);
}

// Eight by eight: pairs, pairs of pairs, halves.
inline void transpose(__m256 (&r)[8]) {
    __m256 pair[8], quad[8];
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
        quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
        quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
        quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
    }
    for (int c = 0; c < 4; ++c) {
        r[c] = _mm256_permute2f128_ps(quad[c], quad[4 + c], 0x20);
        r[4 + c] = _mm256_permute2f128_ps(quad[c], quad[4 + c], 0x31);
    }
}
inline void transpose(f32x16 (&r)[lanes]) {
    __m256 a[8], b[8], c[8], d[8];  // the quarters: rows 0..7 and 8..15, each of columns 0..7 and 8..15
    for (int i = 0; i < 8; ++i) a[i] = r[i].lo, b[i] = r[i].hi, c[i] = r[8 + i].lo, d[i] = r[8 + i].hi;
    transpose(a), transpose(b), transpose(c), transpose(d);
    for (int i = 0; i < 8; ++i) r[i] = {a[i], c[i]}, r[8 + i] = {b[i], d[i]};
}

inline __m256 first_half(__m256 w) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(w), 16)); }
inline __m256 second_half(__m256 w) {
    return _mm256_and_ps(w, _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline f32x16 first_half(f32x16 w) { return {first_half(w.lo), first_half(w.hi)}; }
inline f32x16 second_half(f32x16 w) { return {second_half(w.lo), second_half(w.hi)}; }
template <int k>
inline __m256 signed_byte(__m256 w) {
    const __m256i top = _mm256_slli_epi32(_mm256_castps_si256(w), 24 - 8 * k);
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 24));
}
template <int k>
inline f32x16 signed_byte(f32x16 w) {
    return {signed_byte<k>(w.lo), signed_byte<k>(w.hi)};
}

inline f32x16 load(const int8_t* p) {
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(b, 8)))};
}

inline f32x16 zero_below(f32x16 a, f32x16 x, f32x16 bound) {
    return {_mm256_andnot_ps(_mm256_cmp_ps(x.lo, bound.lo, _CMP_LT_OQ), a.lo),
            _mm256_andnot_ps(_mm256_cmp_ps(x.hi, bound.hi, _CMP_LT_OQ), a.hi)};
}

// ---------------------------------------------------------------------------------------------------------------------
#else

inline f32x16 load_words(const void* p, size_t n) {
    f32x16 r = fill(0.0f);
    __builtin_memcpy(r.v, p, n);
    return r;
}
inline void transpose(f32x16 (&r)[lanes]) {
    for (size_t i = 0; i < lanes; ++i) {
        for (size_t j = 0; j < i; ++j) {  // as integers: a word is not always a float
            const uint32_t a = bits_of(r[i].v[j]);
            __builtin_memcpy(&r[i].v[j], &r[j].v[i], sizeof a);
            __builtin_memcpy(&r[j].v[i], &a, sizeof a);
        }
    }
}
inline f32x16 first_half(f32x16 w) {
    for (size_t i = 0; i < lanes; ++i) w.v[i] = float_of(bits_of(w.v[i]) << 16);
    return w;
}
inline f32x16 second_half(f32x16 w) {
    for (size_t i = 0; i < lanes; ++i) w.v[i] = float_of(bits_of(w.v[i]) & 0xffff0000u);
    return w;
}
template <int k>
inline f32x16 signed_byte(f32x16 w) {
    for (size_t i = 0; i < lanes; ++i) w.v[i] = static_cast<int8_t>((bits_of(w.v[i]) >> (8 * k)) & 0xffu);
    return w;
}
inline f32x16 load(const int8_t* p) {
    f32x16 r;
    for (size_t i = 0; i < lanes; ++i) r.v[i] = p[i];
    return r;
}
inline f32x16 zero_below(f32x16 a, f32x16 x, f32x16 bound) {
    for (size_t i = 0; i < lanes; ++i) a.v[i] = x.v[i] < bound.v[i] ? 0.0f : a.v[i];
    return a;
}

#endif

// ---------------------------------------------------------------------------------------------------------------------
#if !defined(__AVX512F__)
inline f32x16 load(const int8_t* p, size_t n) {
    int8_t buffer[lanes] = {};
    for (size_t i = 0; i < n; ++i) buffer[i] = p[i];
    return load(buffer);
}
#endif

inline void store_columns(const float*, f32x16 words, float* out, size_t) { store(out, words); }
inline void store_columns(const bf16*, f32x16 words, float* out, size_t stride) {
    store(out, first_half(words));
    store(out + stride, second_half(words));
}
inline void store_columns(const int8_t*, f32x16 words, float* out, size_t stride) {
    store(out, signed_byte<0>(words));
    store(out + stride, signed_byte<1>(words));
    store(out + 2 * stride, signed_byte<2>(words));
    store(out + 3 * stride, signed_byte<3>(words));
}

// out[c · stride + r] = rows[r][c] for 16 rows of `cols` elements. Writes columns up to the next multiple of four.
template <typename T>
inline void transpose_rows(const T* const (&rows)[lanes], size_t cols, float* out, size_t stride) {
    constexpr size_t per_word = sizeof(float) / sizeof(T), step = lanes * per_word;
    for (size_t c = 0; c < cols; c += step) {
        const size_t n = cols - c < step ? cols - c : step;
        f32x16 words[lanes];
        for (size_t r = 0; r < lanes; ++r) words[r] = load_words(rows[r] + c, n * sizeof(T));
        transpose(words);
        for (size_t w = 0; w < lanes; ++w)
            if (w * per_word < n) store_columns(rows[0], words[w], out + (c + w * per_word) * stride, stride);
    }
}

// exp(x), exactly zero where that is below the normal floats; NaN stays NaN.
inline f32x16 exp_or_zero(f32x16 x) { return zero_below(exp(x), x, fill(-86.5f)); }

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
