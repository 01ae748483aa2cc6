// Sixteen floats, the same sixteen at every level.
//
// Kernels are written once over f32x16. It is one AVX-512 register, two AVX2 registers or an array that the compiler may
// vectorize as it likes; lane i always means element i, every operation is the IEEE one, rounded once, and sum() adds in
// one fixed order. So a kernel that uses nothing else gives the same bits at every level. (Only a NaN's payload is left
// open in float32; in bfloat16 every NaN is stored as 0x7fc0.)
//
// Everything sits in the level's own namespace and no std:: template is used: an inline function compiled with AVX-512
// that the linker merged with its generic twin would crash older CPUs.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#if !defined(NEMOTRON_H_LEVEL)
#error "compile kernels with -DNEMOTRON_H_LEVEL=generic|avx2|avx512"
#endif

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {

constexpr size_t lanes = 16;

struct bf16 {
    uint16_t bits;
};

// ---------------------------------------------------------------------------------------------------------------------
#if defined(__AVX512F__)

struct f32x16 {
    __m512 v;
};

inline __mmask16 first(size_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline f32x16 fill(float a) { return {_mm512_set1_ps(a)}; }
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline f32x16 mul(f32x16 a, f32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline f32x16 add(f32x16 a, f32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline f32x16 sub(f32x16 a, f32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline f32x16 div(f32x16 a, f32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline f32x16 max(f32x16 a, f32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline f32x16 min(f32x16 a, f32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline f32x16 abs(f32x16 a) { return {_mm512_abs_ps(a.v)}; }
inline f32x16 times_power(f32x16 a, f32x16 t) {
    const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(t.v), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), n))};
}

inline f32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline f32x16 load(const float* p, size_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline void store(float* p, f32x16 a) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, f32x16 a, size_t n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
inline void stream(float* p, f32x16 a) { _mm512_stream_ps(p, a.v); }
inline void stream_end() { _mm_sfence(); }

inline f32x16 widen(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
inline f32x16 load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline f32x16 load(const bf16* p, size_t n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }

// Not vcvtneps2bf16: it reads subnormals as zero, which the other levels do not.
inline __m256i narrow(f32x16 a) {
    const __m512i u = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
    r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(r);
}
inline void store(bf16* p, f32x16 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
inline void store(bf16* p, f32x16 a, size_t n) { _mm256_mask_storeu_epi16(p, first(n), narrow(a)); }

inline uint32_t mask_at_least(f32x16 a, f32x16 bound) { return _mm512_cmp_ps_mask(a.v, bound.v, _CMP_GE_OQ); }
inline f32x16 where(uint32_t mask, f32x16 a) { return {_mm512_maskz_mov_ps(static_cast<__mmask16>(mask), a.v)}; }
inline f32x16 either(uint32_t mask, f32x16 a, f32x16 b) {
    return {_mm512_mask_mov_ps(b.v, static_cast<__mmask16>(mask), a.v)};
}
inline void compress(float* p, f32x16 a, uint32_t mask) {
    _mm512_storeu_ps(p, _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), a.v));
}

inline __m256 fold(f32x16 a) { return _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1)); }
inline __m256 fold_max(f32x16 a) { return _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1)); }

// ---------------------------------------------------------------------------------------------------------------------
#elif defined(__AVX2__)

struct f32x16 {
    __m256 lo, hi;
};

inline f32x16 fill(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline f32x16 mul(f32x16 a, f32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline f32x16 add(f32x16 a, f32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline f32x16 sub(f32x16 a, f32x16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline f32x16 div(f32x16 a, f32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline f32x16 max(f32x16 a, f32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline f32x16 min(f32x16 a, f32x16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline f32x16 abs(f32x16 a) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(a.lo, magnitude), _mm256_and_ps(a.hi, magnitude)};
}
inline __m256 times_power(__m256 a, __m256 t) {
    const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), n));
}
inline f32x16 times_power(f32x16 a, f32x16 t) { return {times_power(a.lo, t.lo), times_power(a.hi, t.hi)}; }

inline f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, f32x16 a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
inline void stream(float* p, f32x16 a) {
    _mm256_stream_ps(p, a.lo);
    _mm256_stream_ps(p + 8, a.hi);
}
inline void stream_end() { _mm_sfence(); }

inline __m256 widen(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
inline f32x16 load(const bf16* p) {
    const __m128i* q = reinterpret_cast<const __m128i*>(p);
    return {widen(_mm_loadu_si128(q)), widen(_mm_loadu_si128(q + 1))};
}

inline __m256i narrow(__m256 a) {
    const __m256i u = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
}
inline void store(bf16* p, f32x16 a) {
    // packus works within 128-bit halves; the permutation puts the four quarters back in order.
    const __m256i packed = _mm256_packus_epi32(narrow(a.lo), narrow(a.hi));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

inline uint32_t mask_at_least(f32x16 a, f32x16 bound) {
    const int lo = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, bound.lo, _CMP_GE_OQ));
    const int hi = _mm256_movemask_ps(_mm256_cmp_ps(a.hi, bound.hi, _CMP_GE_OQ));
    return static_cast<uint32_t>(lo | hi << 8);
}
inline __m256 all_ones(uint32_t mask) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i bits = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), lane);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(bits, lane));
}
inline f32x16 where(uint32_t mask, f32x16 a) {
    return {_mm256_and_ps(a.lo, all_ones(mask)), _mm256_and_ps(a.hi, all_ones(mask >> 8))};
}
inline f32x16 either(uint32_t mask, f32x16 a, f32x16 b) {
    return {_mm256_blendv_ps(b.lo, a.lo, all_ones(mask)), _mm256_blendv_ps(b.hi, a.hi, all_ones(mask >> 8))};
}

inline __m256 fold(f32x16 a) { return _mm256_add_ps(a.lo, a.hi); }
inline __m256 fold_max(f32x16 a) { return _mm256_max_ps(a.lo, a.hi); }

// ---------------------------------------------------------------------------------------------------------------------
#else

struct f32x16 {
    float v[lanes];
};

inline f32x16 fill(float a) {
    f32x16 r;
    for (size_t i = 0; i < lanes; ++i) r.v[i] = a;
    return r;
}
// A true fused multiply-add. Where the target has no instruction for it, libm has: a call for each lane, and software on
// old CPUs.
#if defined(__SSE2__)
// Two double additions do for four lanes what four calls would: the product of two floats is exact in double, and the sum,
// rounded to 53 bits and then to 24, is the fused one unless the first rounding made a tie of what was none. A tie of a
// rounded sum, sums below float's normal numbers, whose ties lie elsewhere, infinities and NaNs go to libm.
inline __m128i words(__m128d low, __m128d high) {  // the lower words of four doubles
    return _mm_castps_si128(_mm_shuffle_ps(_mm_castpd_ps(low), _mm_castpd_ps(high), 0x88));
}
inline __m128d is_exact(__m128d sum, __m128d a, __m128d b) {
    return _mm_and_pd(_mm_cmpeq_pd(_mm_sub_pd(sum, a), b), _mm_cmpeq_pd(_mm_sub_pd(sum, b), a));
}
inline bool fma_4(const float* a, const float* b, float* c) {
    const __m128 x = _mm_loadu_ps(a), y = _mm_loadu_ps(b), z = _mm_loadu_ps(c);
    const __m128d p = _mm_mul_pd(_mm_cvtps_pd(x), _mm_cvtps_pd(y)), q = _mm_cvtps_pd(z), low = _mm_add_pd(p, q);
    const __m128d r = _mm_mul_pd(_mm_cvtps_pd(_mm_movehl_ps(x, x)), _mm_cvtps_pd(_mm_movehl_ps(y, y)));
    const __m128d s = _mm_cvtps_pd(_mm_movehl_ps(z, z)), high = _mm_add_pd(r, s);
    const __m128i upper = _mm_castps_si128(_mm_shuffle_ps(_mm_castpd_ps(low), _mm_castpd_ps(high), 0xdd));
    const __m128i size = _mm_and_si128(upper, _mm_set1_epi32(0x7fffffff)), rest = words(low, high);
    const __m128i tie = _mm_cmpeq_epi32(_mm_and_si128(rest, _mm_set1_epi32(0x1fffffff)), _mm_set1_epi32(0x10000000));
    const __m128i small = _mm_andnot_si128(_mm_cmpeq_epi32(size, _mm_setzero_si128()),
                                           _mm_cmpgt_epi32(_mm_set1_epi32((1023 - 126) << 20), size));
    const __m128i outside = _mm_or_si128(small, _mm_cmpgt_epi32(size, _mm_set1_epi32(0x7fefffff)));
    if (_mm_movemask_epi8(_mm_or_si128(tie, outside)) != 0) {
        const __m128i exact = words(is_exact(low, p, q), is_exact(high, r, s));
        if (_mm_movemask_epi8(_mm_or_si128(_mm_andnot_si128(exact, tie), outside)) != 0) return false;
    }
    _mm_storeu_ps(c, _mm_movelh_ps(_mm_cvtpd_ps(low), _mm_cvtpd_ps(high)));
    return true;
}
#else
inline bool fma_4(const float*, const float*, float*) { return false; }
#endif
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
    for (size_t i = 0; i < lanes; i += 4) {
        if (fma_4(a.v + i, b.v + i, c.v + i)) continue;
        for (size_t j = i; j < i + 4; ++j) c.v[j] = __builtin_fmaf(a.v[j], b.v[j], c.v[j]);
    }
    return c;
}
inline f32x16 mul(f32x16 a, f32x16 b) {
    for (size_t i = 0; i < lanes; ++i) a.v[i] *= b.v[i];
    return a;
}
inline f32x16 add(f32x16 a, f32x16 b) {
    for (size_t i = 0; i < lanes; ++i) a.v[i] += b.v[i];
    return a;
}
inline f32x16 sub(f32x16 a, f32x16 b) {
    for (size_t i = 0; i < lanes; ++i) a.v[i] -= b.v[i];
    return a;
}
inline f32x16 div(f32x16 a, f32x16 b) {
    for (size_t i = 0; i < lanes; ++i) a.v[i] /= b.v[i];
    return a;
}
inline f32x16 max(f32x16 a, f32x16 b) {
    for (size_t i = 0; i < lanes; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
}
inline f32x16 min(f32x16 a, f32x16 b) {
    for (size_t i = 0; i < lanes; ++i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
    return a;
}
inline f32x16 abs(f32x16 a) {
    for (size_t i = 0; i < lanes; ++i) a.v[i] = __builtin_fabsf(a.v[i]);
    return a;
}

inline uint32_t bits_of(float a) {
    uint32_t u;
    __builtin_memcpy(&u, &a, sizeof u);
    return u;
}
inline float float_of(uint32_t u) {
    float a;
    __builtin_memcpy(&a, &u, sizeof a);
    return a;
}

inline uint32_t mask_at_least(f32x16 a, f32x16 bound) {
    uint32_t mask = 0;
    for (size_t i = 0; i < lanes; ++i) mask |= static_cast<uint32_t>(a.v[i] >= bound.v[i]) << i;
    return mask;
}
inline f32x16 where(uint32_t mask, f32x16 a) {
    for (size_t i = 0; i < lanes; ++i) a.v[i] = (mask >> i & 1) != 0 ? a.v[i] : 0.0f;
    return a;
}
inline f32x16 either(uint32_t mask, f32x16 a, f32x16 b) {
    for (size_t i = 0; i < lanes; ++i) a.v[i] = (mask >> i & 1) != 0 ? a.v[i] : b.v[i];
    return a;
}
inline f32x16 times_power(f32x16 a, f32x16 t) {
    for (size_t i = 0; i < lanes; ++i) a.v[i] = float_of(bits_of(a.v[i]) + (bits_of(t.v[i]) << 23));
    return a;
}

inline f32x16 load(const float* p) {
    f32x16 r;
    for (size_t i = 0; i < lanes; ++i) r.v[i] = p[i];
    return r;
}
inline f32x16 load(const bf16* p) {
    f32x16 r;
    for (size_t i = 0; i < lanes; ++i) r.v[i] = float_of(static_cast<uint32_t>(p[i].bits) << 16);
    return r;
}
inline void store(float* p, f32x16 a) {
    for (size_t i = 0; i < lanes; ++i) p[i] = a.v[i];
}
inline void stream(float* p, f32x16 a) { store(p, a); }
inline void stream_end() {}
inline void store(bf16* p, f32x16 a) {
    for (size_t i = 0; i < lanes; ++i) {
        const uint32_t u = bits_of(a.v[i]);
        const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
        p[i].bits = static_cast<uint16_t>(nan ? 0x7fc0u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
    }
}

#endif

// ---------------------------------------------------------------------------------------------------------------------
#if !defined(__AVX512F__)
inline void compress(float* p, f32x16 a, uint32_t mask) {
    float buffer[lanes];
    store(buffer, a);
    for (; mask != 0; mask &= mask - 1) *p++ = buffer[__builtin_ctz(mask)];
}
// The first n elements, the other lanes zero; without masks, by way of a buffer. n < 16.
template <typename T>
inline f32x16 load(const T* p, size_t n) {
    T buffer[lanes] = {};
    for (size_t i = 0; i < n; ++i) buffer[i] = p[i];
    return load(buffer);
}
template <typename T>
inline void store(T* p, f32x16 a, size_t n) {
    T buffer[lanes];
    store(buffer, a);
    for (size_t i = 0; i < n; ++i) p[i] = buffer[i];
}
#endif

// stream(p, a): a store past the caches, for memory that nobody reads soon; p at 64 bytes. A thread calls stream_end()
// before others may read what it streamed.
//
// mask_at_least(a, bound): bit i says whether lane i of a reaches bound; NaN does not. where(mask, a): the lanes of the
// mask, the others zero; either(mask, a, b): the others from b. compress(p, a, mask): the lanes of the mask side by side; p has room for sixteen.
//
// Up to sixteen elements: all of them where n is larger; n >= 1.
template <typename T>
inline f32x16 load_some(const T* p, size_t n) {
    return n >= lanes ? load(p) : load(p, n);
}
template <typename T>
inline void store_some(T* p, f32x16 a, size_t n) {
    if (n >= lanes) store(p, a);
    else store(p, a, n);
}

// max(a, b) and min(a, b) are b where either is NaN, as the x86 instruction has it: put the constant first.
//
// times_power(a, t): a · 2^n for t = n + 1.5·2^23, whose lowest bits are the integer n. Neither may leave the normal
// range of exponents.

// exp(x) within 2 ulp, of x clamped to [-86.5, 88.5]; NaN stays NaN. x = n·ln 2 + r with |r| <= ln 2 / 2; the constant
// 1.5·2^23 rounds to the nearest integer by pushing the fraction out of the mantissa. The polynomial is Taylor's, to r^7.
inline f32x16 exp(f32x16 x) {
    x = min(fill(88.5f), max(fill(-86.5f), x));
    const f32x16 magic = fill(12582912.0f);
    const f32x16 t = fma(x, fill(1.44269504f), magic);
    const f32x16 n = sub(t, magic);
    f32x16 r = fma(n, fill(-0.693145751953125f), x);  // ln 2 in two parts, the first exact times any n
    r = fma(n, fill(-1.42860677e-6f), r);
    f32x16 p = fma(r, fill(1.0f / 5040), fill(1.0f / 720));
    p = fma(p, r, fill(1.0f / 120));
    p = fma(p, r, fill(1.0f / 24));
    p = fma(p, r, fill(1.0f / 6));
    p = fma(p, r, fill(0.5f));
    p = fma(p, r, fill(1.0f));
    p = fma(p, r, fill(1.0f));
    return times_power(p, t);
}

inline f32x16 sigmoid(f32x16 x) { return div(fill(1.0f), add(fill(1.0f), exp(sub(fill(0.0f), x)))); }

// x · sigmoid(x) = x / (1 + exp(-x)). exp stops at 88.5, and -1e37 / exp(88.5) is far from zero: beyond, the divisor goes
// on to infinity, which makes silu(-inf) NaN, as PyTorch has it.
inline f32x16 silu(f32x16 x) {
    const f32x16 minus = sub(fill(0.0f), x);
    const f32x16 beyond = mul(max(fill(0.0f), sub(minus, fill(88.5f))), fill(3e38f));
    return div(x, add(fill(1.0f), add(exp(minus), beyond)));
}

// relu(x)², NaN staying NaN.
inline f32x16 relu2(f32x16 x) {
    x = max(fill(0.0f), x);
    return mul(x, x);
}

// The sum of the lanes in one order everywhere: i + (i + 8), then i + (i + 4), then (0 + 2) + (1 + 3).
inline float sum(f32x16 a) {
#if defined(__AVX2__)
    const __m256 eight = fold(a);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
    for (size_t half = lanes / 2; half > 0; half /= 2)
        for (size_t i = 0; i < half; ++i) a.v[i] += a.v[i + half];
    return a.v[0];
#endif
}

// The greatest lane, of lanes without NaN.
inline float greatest(f32x16 a) {
#if defined(__AVX2__)
    const __m256 eight = fold_max(a);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
    for (size_t half = lanes / 2; half > 0; half /= 2)
        for (size_t i = 0; i < half; ++i) a.v[i] = a.v[i + half] > a.v[i] ? a.v[i + half] : a.v[i];
    return a.v[0];
#endif
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
