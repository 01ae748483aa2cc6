// Dot products of bytes, exact in int32 at every level.
//
// Sixteen output rows sit in the sixteen lanes; a lane holds four consecutive k of its row, so one load brings 16 rows
// times 4 k and one instruction (vpdpbusd) multiplies them with the same four activations, broadcast, and adds. AVX2 does
// it in three. Everything is exact, so the order of additions inside a group does not matter.
#pragma once

#include "simd.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {

// ---------------------------------------------------------------------------------------------------------------------
#if defined(__AVX512F__)

struct i32x16 {
    __m512i v;
};
struct bytes64 {
    __m512i v;
};

inline i32x16 fill_int(int32_t a) { return {_mm512_set1_epi32(a)}; }
inline i32x16 add(i32x16 a, i32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline f32x16 to_float(i32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline i32x16 to_int(f32x16 a) { return {_mm512_cvtps_epi32(a.v)}; }  // of whole numbers

inline bytes64 load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline bytes64 low_nibbles(bytes64 w) { return {_mm512_and_si512(w.v, _mm512_set1_epi8(15))}; }
inline bytes64 high_nibbles(bytes64 w) { return {_mm512_and_si512(_mm512_srli_epi16(w.v, 4), _mm512_set1_epi8(15))}; }

// sum + Σ w·a over the four bytes of each lane; w 0..15, a the four signed bytes of `quad`.
inline i32x16 dot_nibbles(i32x16 sum, bytes64 w, int32_t quad) {
    return {_mm512_dpbusd_epi32(sum.v, w.v, _mm512_set1_epi32(quad))};
}
// The same for signed w, up to start_signed's constant: the instruction takes w unsigned, so w + 128 goes in, and the
// sum must start at -128 · Σ a.
inline i32x16 start_signed(int32_t sum_of_activations) { return fill_int(-128 * sum_of_activations); }
// In two steps, for bytes that meet many activations: biased once, then multiplied.
inline bytes64 biased(bytes64 w) { return {_mm512_xor_si512(w.v, _mm512_set1_epi8(static_cast<char>(0x80)))}; }
inline i32x16 dot_biased(i32x16 sum, bytes64 w, int32_t quad) { return dot_nibbles(sum, w, quad); }
inline i32x16 dot_signed(i32x16 sum, bytes64 w, int32_t quad) { return dot_biased(sum, biased(w), quad); }
// a · m for a and m within 16 bits with sign: only the low halves of the lanes are multiplied.
inline i32x16 mul_short(i32x16 a, i32x16 m) {
    return {_mm512_madd_epi16(a.v, _mm512_and_si512(m.v, _mm512_set1_epi32(0xffff)))};
}
inline i32x16 load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store(int32_t* p, i32x16 a) { _mm512_storeu_si512(p, a.v); }
// The same in one instruction with an addition, for an m that has been through low_half.
inline i32x16 low_half(i32x16 m) { return {_mm512_and_si512(m.v, _mm512_set1_epi32(0xffff))}; }
inline i32x16 add_short(i32x16 sum, i32x16 a, i32x16 m) { return {_mm512_dpwssd_epi32(sum.v, a.v, m.v)}; }

// -a in the lanes whose bit is set.
inline i32x16 negate(i32x16 a, uint16_t lanes_set) {
    return {_mm512_mask_sub_epi32(a.v, lanes_set, _mm512_setzero_si512(), a.v)};
}

inline i32x16 widen_bytes(const uint8_t* p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline i32x16 low_nibble(i32x16 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi32(15))}; }
inline i32x16 high_nibble(i32x16 a) { return {_mm512_srli_epi32(a.v, 4)}; }
inline i32x16 shift_left(i32x16 a, int n) { return {_mm512_slli_epi32(a.v, static_cast<unsigned>(n))}; }
inline f32x16 as_float(i32x16 a) { return {_mm512_castsi512_ps(a.v)}; }
inline i32x16 as_int(f32x16 a) { return {_mm512_castps_si512(a.v)}; }
inline void store(int8_t* p, i32x16 a) {  // lanes in [-128, 127]
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
// The k-th signed byte of every lane, as a float.
template <int k>
inline f32x16 byte_as_float(bytes64 w) {
    return {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(w.v, 24 - 8 * k), 24))};
}

inline bytes64 minus_eight(bytes64 w) { return {_mm512_sub_epi8(w.v, _mm512_set1_epi8(8))}; }
inline void store(uint8_t* p, bytes64 w) { _mm512_storeu_si512(p, w.v); }

// (nibble - 8) · m of every byte, m being its lane's. A product of 16-bit words does two bytes at once, because the lower
// one, at most 15 · 15, stays within its byte. The sign comes last: -(p - 8m) = ~p - ~8m. With `bias`, what comes out is
// biased(), at no cost.
struct Multiplier {
    __m512i words, flip, offset;
};
template <bool bias>
inline Multiplier multiplier(i32x16 m) {  // in -15 .. 15
    const __m512i one_byte = _mm512_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0, 0x0c0c0c0c, 0x08080808, 0x04040404, 0,
                                              0x0c0c0c0c, 0x08080808, 0x04040404, 0, 0x0c0c0c0c, 0x08080808, 0x04040404, 0);
    const __m512i size = _mm512_abs_epi32(m.v), flip = _mm512_srai_epi32(m.v, 31);
    const __m512i offset = _mm512_xor_si512(_mm512_slli_epi32(size, 3), flip);
    const __m512i more = _mm512_set1_epi8(static_cast<char>(bias ? 0x80 : 0));  // - (o ^ 128) = 128 - o
    return {_mm512_or_si512(size, _mm512_slli_epi32(size, 16)), flip,
            _mm512_xor_si512(_mm512_shuffle_epi8(offset, one_byte), more)};
}
inline bytes64 times(bytes64 nibbles, const Multiplier& m) {
    const __m512i product = _mm512_mullo_epi16(nibbles.v, m.words);
    return {_mm512_sub_epi8(_mm512_xor_si512(product, m.flip), m.offset)};
}

inline f32x16 load_half(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// ---------------------------------------------------------------------------------------------------------------------
#elif defined(__AVX2__)

struct i32x16 {
    __m256i lo, hi;
};
struct bytes64 {
    __m256i lo, hi;
};

inline i32x16 fill_int(int32_t a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
inline i32x16 add(i32x16 a, i32x16 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
inline f32x16 to_float(i32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline i32x16 to_int(f32x16 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }

inline bytes64 load_bytes(const uint8_t* p) {
    const __m256i* q = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline bytes64 low_nibbles(bytes64 w) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(w.lo, mask), _mm256_and_si256(w.hi, mask)};
}
inline bytes64 high_nibbles(bytes64 w) {
    return low_nibbles({_mm256_srli_epi16(w.lo, 4), _mm256_srli_epi16(w.hi, 4)});
}

// pmaddubsw adds two products in 16 bits: 2·15·127 fits; so does 2·128·127.
inline __m256i dot_nibbles(__m256i sum, __m256i w, __m256i a) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, a), _mm256_set1_epi16(1)));
}
inline i32x16 dot_nibbles(i32x16 sum, bytes64 w, int32_t quad) {
    const __m256i a = _mm256_set1_epi32(quad);
    return {dot_nibbles(sum.lo, w.lo, a), dot_nibbles(sum.hi, w.hi, a)};
}
inline i32x16 start_signed(int32_t) { return fill_int(0); }
inline i32x16 dot_signed(i32x16 sum, bytes64 w, int32_t quad) {
    const __m256i a = _mm256_set1_epi32(quad);  // |w| · (a with w's sign)
    return {dot_nibbles(sum.lo, _mm256_abs_epi8(w.lo), _mm256_sign_epi8(a, w.lo)),
            dot_nibbles(sum.hi, _mm256_abs_epi8(w.hi), _mm256_sign_epi8(a, w.hi))};
}
inline i32x16 mul_short(i32x16 a, i32x16 m) {
    const __m256i low = _mm256_set1_epi32(0xffff);
    return {_mm256_madd_epi16(a.lo, _mm256_and_si256(m.lo, low)), _mm256_madd_epi16(a.hi, _mm256_and_si256(m.hi, low))};
}

inline i32x16 negate(i32x16 a, uint16_t lanes_set) {
    const __m256i all = _mm256_set1_epi32(lanes_set);
    const __m256i low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), high = _mm256_slli_epi32(low, 8);
    const __m256i lo = _mm256_cmpeq_epi32(_mm256_and_si256(all, low), low);  // -1 where set: (a ^ -1) + 1 = -a
    const __m256i hi = _mm256_cmpeq_epi32(_mm256_and_si256(all, high), high);
    return {_mm256_sub_epi32(_mm256_xor_si256(a.lo, lo), lo), _mm256_sub_epi32(_mm256_xor_si256(a.hi, hi), hi)};
}

inline i32x16 widen_bytes(const uint8_t* p) {
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepu8_epi32(b), _mm256_cvtepu8_epi32(_mm_srli_si128(b, 8))};
}
inline i32x16 low_nibble(i32x16 a) {
    const __m256i mask = _mm256_set1_epi32(15);
    return {_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask)};
}
inline i32x16 high_nibble(i32x16 a) { return {_mm256_srli_epi32(a.lo, 4), _mm256_srli_epi32(a.hi, 4)}; }
inline i32x16 shift_left(i32x16 a, int n) { return {_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n)}; }
inline f32x16 as_float(i32x16 a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
inline i32x16 as_int(f32x16 a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
inline void store(int8_t* p, i32x16 a) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
template <int k>
inline f32x16 byte_as_float(bytes64 w) {
    return {_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(w.lo, 24 - 8 * k), 24)),
            _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(w.hi, 24 - 8 * k), 24))};
}

inline bytes64 minus_eight(bytes64 w) {
    const __m256i eight = _mm256_set1_epi8(8);
    return {_mm256_sub_epi8(w.lo, eight), _mm256_sub_epi8(w.hi, eight)};
}

inline f32x16 load_half(const uint16_t* p) {
    const __m128i* q = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// ---------------------------------------------------------------------------------------------------------------------
#else

struct i32x16 {
    int32_t v[lanes];
};
struct bytes64 {
    uint8_t v[4 * lanes];
};

inline i32x16 fill_int(int32_t a) {
    i32x16 r;
    for (size_t i = 0; i < lanes; ++i) r.v[i] = a;
    return r;
}
inline i32x16 add(i32x16 a, i32x16 b) {
    for (size_t i = 0; i < lanes; ++i) a.v[i] += b.v[i];
    return a;
}
inline f32x16 to_float(i32x16 a) {
    f32x16 r;
    for (size_t i = 0; i < lanes; ++i) r.v[i] = static_cast<float>(a.v[i]);
    return r;
}

inline i32x16 to_int(f32x16 a) {
    i32x16 r;
    for (size_t i = 0; i < lanes; ++i) r.v[i] = static_cast<int32_t>(a.v[i]);
    return r;
}

inline bytes64 load_bytes(const uint8_t* p) {
    bytes64 r;
    __builtin_memcpy(r.v, p, sizeof r.v);
    return r;
}
// Eight bytes at a time: 64-bit words are what every compiler keeps in registers.
inline bytes64 low_nibbles(bytes64 w) {
    uint64_t words[8];
    __builtin_memcpy(words, w.v, sizeof words);
    for (size_t i = 0; i < 8; ++i) words[i] &= 0x0f0f0f0f0f0f0f0fu;
    __builtin_memcpy(w.v, words, sizeof words);
    return w;
}
inline bytes64 high_nibbles(bytes64 w) {
    uint64_t words[8];
    __builtin_memcpy(words, w.v, sizeof words);
    for (size_t i = 0; i < 8; ++i) words[i] = words[i] >> 4 & 0x0f0f0f0f0f0f0f0fu;
    __builtin_memcpy(w.v, words, sizeof words);
    return w;
}

// Every x86-64 has SSE2, whose pmaddwd adds two products of 16-bit numbers: a lane's bytes 0 and 2, then 1 and 3. Other
// machines take the plain loops.
#if defined(__SSE2__)
template <bool is_signed>
inline __m128i even_bytes(__m128i w) {
    return is_signed ? _mm_srai_epi16(_mm_slli_epi16(w, 8), 8) : _mm_and_si128(w, _mm_set1_epi16(0xff));
}
template <bool is_signed>
inline __m128i odd_bytes(__m128i w) {
    return is_signed ? _mm_srai_epi16(w, 8) : _mm_srli_epi16(w, 8);
}
template <typename W>
__attribute__((always_inline)) inline i32x16 dot(i32x16 sum, const bytes64& w, int32_t quad) {
    constexpr bool is_signed = static_cast<W>(-1) < 0;
    const __m128i a = _mm_set1_epi32(quad), even = even_bytes<true>(a), odd = odd_bytes<true>(a);
    for (size_t i = 0; i < lanes; i += 4) {  // four lanes: 16 bytes
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.v + 4 * i));
        const __m128i first = _mm_madd_epi16(even_bytes<is_signed>(bytes), even);
        const __m128i second = _mm_madd_epi16(odd_bytes<is_signed>(bytes), odd);
        __m128i* at = reinterpret_cast<__m128i*>(sum.v + i);
        _mm_storeu_si128(at, _mm_add_epi32(_mm_loadu_si128(at), _mm_add_epi32(first, second)));
    }
    return sum;
}
#else
template <typename W>
inline i32x16 dot(i32x16 sum, const bytes64& w, int32_t quad) {
    int8_t a[4];
    __builtin_memcpy(a, &quad, sizeof a);
    for (size_t i = 0; i < lanes; ++i)
        for (size_t k = 0; k < 4; ++k) sum.v[i] += static_cast<W>(w.v[4 * i + k]) * a[k];
    return sum;
}
#endif
inline i32x16 dot_nibbles(i32x16 sum, bytes64 w, int32_t quad) { return dot<uint8_t>(sum, w, quad); }
inline i32x16 start_signed(int32_t) { return fill_int(0); }
inline i32x16 dot_signed(i32x16 sum, bytes64 w, int32_t quad) { return dot<int8_t>(sum, w, quad); }
inline i32x16 mul_short(i32x16 a, i32x16 m) {
    for (size_t i = 0; i < lanes; ++i) a.v[i] = static_cast<int16_t>(a.v[i]) * static_cast<int16_t>(m.v[i]);
    return a;
}

// By masks of whole lanes, not `a ? b : c`: of that gcc makes sixteen stores, which the next vector load has to wait for.
inline i32x16 negate(i32x16 a, uint16_t lanes_set) {
    static constexpr int32_t bit[lanes] = {1,     1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                           1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
    const int32_t set = lanes_set;
    for (size_t i = 0; i < lanes; ++i) {
        const int32_t mask = -static_cast<int32_t>((set & bit[i]) == bit[i]);
        a.v[i] = (a.v[i] ^ mask) - mask;
    }
    return a;
}

inline i32x16 widen_bytes(const uint8_t* p) {
    i32x16 r;
    for (size_t i = 0; i < lanes; ++i) r.v[i] = p[i];
    return r;
}
inline i32x16 low_nibble(i32x16 a) {
    for (size_t i = 0; i < lanes; ++i) a.v[i] &= 15;
    return a;
}
inline i32x16 high_nibble(i32x16 a) {
    for (size_t i = 0; i < lanes; ++i) a.v[i] >>= 4;
    return a;
}
inline i32x16 shift_left(i32x16 a, int n) {
    for (size_t i = 0; i < lanes; ++i) a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << n);
    return a;
}
inline f32x16 as_float(i32x16 a) {
    f32x16 r;
    __builtin_memcpy(r.v, a.v, sizeof r.v);
    return r;
}
inline i32x16 as_int(f32x16 a) {
    i32x16 r;
    __builtin_memcpy(r.v, a.v, sizeof r.v);
    return r;
}
inline void store(int8_t* p, i32x16 a) {
    for (size_t i = 0; i < lanes; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}
template <int k>
inline f32x16 byte_as_float(bytes64 w) {
    f32x16 r;
    for (size_t i = 0; i < lanes; ++i) r.v[i] = static_cast<int8_t>(w.v[4 * i + k]);
    return r;
}

inline bytes64 minus_eight(bytes64 w) {
    for (size_t i = 0; i < 4 * lanes; ++i) w.v[i] = static_cast<uint8_t>(w.v[i] - 8);
    return w;
}

// float16 to float32, subnormals included.
inline float widen_half(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = static_cast<uint32_t>(h & 0x7fff) << 13;
    if ((h & 0x7c00) == 0x7c00) return float_of(sign | rest | 0x7f800000u);
    if ((h & 0x7c00) != 0) return float_of(sign | (rest + (112u << 23)));  // the exponents' biases are 112 apart
    const float magnitude = static_cast<float>(h & 0x3ff) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -magnitude : magnitude;
}
inline f32x16 load_half(const uint16_t* p) {
    f32x16 r;
    for (size_t i = 0; i < lanes; ++i) r.v[i] = widen_half(p[i]);
    return r;
}

inline void prefetch(const void* p) { __builtin_prefetch(p); }

#endif

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
