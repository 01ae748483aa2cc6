// How fast this level can multiply and add, from registers alone: the bound of every matrix product by arithmetic, and
// what a benchmark holds its TFLOP/s against. Nothing is read from memory and nothing but one sum is written.
//
// Each instruction has its result four cycles or so later, and two start in every cycle: below eight chains, the adders
// would wait. Twelve chains leave room for the operands in sixteen registers; AVX-512 has thirty-two, and AVX2's half as
// wide registers come in pairs, so six chains of f32x16 are its twelve.
//
// Operations: a multiply-add is two. The values stay small whatever the number of rounds, for one sum is as fast as another
// only while none is subnormal, infinite or NaN.
#include "../kernels.h"
#include "../pool.h"
#include "../simd.h"
#include "../simd_int.h"
#include "tiles.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr size_t chains = 12;
#else
constexpr size_t chains = 6;
#endif
constexpr size_t unrolled = 16;  // steps of a round: loop counters are then a small part of the work

// The compiler may not know these values, or it would do the work itself, once.
inline float unknown(float a) {
    __asm__ volatile("" : "+m"(a));
    return a;
}

double float32_rounds(size_t rounds, float* sink) {
    f32x16 sums[chains];
    for (size_t c = 0; c < chains; ++c) sums[c] = fill(unknown(static_cast<float>(c)));
    const f32x16 a = fill(unknown(0.5f)), b = fill(unknown(1.0f));  // sum = sum / 2 + 1 tends to 2
    for (size_t r = 0; r < rounds; ++r)
        for (size_t i = 0; i < unrolled; ++i)
            for (size_t c = 0; c < chains; ++c) sums[c] = fma(sums[c], a, b);
    for (size_t c = 1; c < chains; ++c) sums[0] = add(sums[0], sums[c]);
    *sink = sum(sums[0]);
    return 2.0 * static_cast<double>(rounds * unrolled * chains * lanes);
}

#if defined(NEMOTRON_H_TILES)
// Four sums of 16 × 16 from two tiles of rows and two of columns, as a product of matrices has them.
template <typename Four>
double tile_rounds(size_t rounds, size_t elements, float* sink, const Four& four) {
    const Tiles tiles(tile_height);
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    tile_zero<tile_a>(), tile_zero<tile_a + 1>(), tile_zero<tile_b>(), tile_zero<tile_b + 1>();
    for (size_t r = 0; r < rounds; ++r) four(), four();
    alignas(64) uint8_t out[tile_height * tile_width];
    tile_store<0>(out, tile_width);
    *sink = static_cast<float>(out[0]);
    return 2.0 * static_cast<double>(rounds * 8 * tile_height * lanes * elements);
}

double bf16_rounds(size_t rounds, float* sink) {
    return tile_rounds(rounds, tile_width / 2, sink, [] {
        tile_dot_bf16<0, tile_a, tile_b>(), tile_dot_bf16<1, tile_a, tile_b + 1>();
        tile_dot_bf16<2, tile_a + 1, tile_b>(), tile_dot_bf16<3, tile_a + 1, tile_b + 1>();
    });
}

double int8_rounds(size_t rounds, float* sink) {
    return tile_rounds(rounds, tile_width, sink, [] {
        tile_dot_bytes<0, tile_a, tile_b>(), tile_dot_bytes<1, tile_a, tile_b + 1>();
        tile_dot_bytes<2, tile_a + 1, tile_b>(), tile_dot_bytes<3, tile_a + 1, tile_b + 1>();
    });
}

#else

// Makes the compiler believe that the bytes are others now. Where products and sums are instructions of their own, it
// would else multiply once and only add; vpdpbusd does both.
inline void renew([[maybe_unused]] bytes64& w) {
#if defined(__AVX512F__)
#elif defined(__AVX2__)
    __asm__ volatile("" : "+x"(w.lo), "+x"(w.hi));
#else
    __asm__ volatile("" : "+m"(w));
#endif
}

double int8_rounds(size_t rounds, float* sink) {
    i32x16 sums[chains];
    for (size_t c = 0; c < chains; ++c) sums[c] = fill_int(static_cast<int32_t>(unknown(static_cast<float>(c))));
    uint8_t bytes[4 * lanes];
    for (size_t i = 0; i < sizeof bytes; ++i) bytes[i] = static_cast<uint8_t>(unknown(3.0f));
    bytes64 w = load_bytes(bytes);
    const int32_t quad = static_cast<int32_t>(unknown(16777216.0f));  // one activation of 1, three of 0
    for (size_t r = 0; r < rounds; ++r)
        for (size_t i = 0; i < unrolled; ++i)
            for (size_t c = 0; c < chains; ++c) {
                renew(w);
                sums[c] = dot_nibbles(sums[c], w, quad);
            }
    for (size_t c = 1; c < chains; ++c) sums[0] = add(sums[0], sums[c]);
    *sink = sum(to_float(sums[0]));
    return 2.0 * static_cast<double>(rounds * unrolled * chains * 4 * lanes);
}

#if defined(__AVX512BF16__)
double bf16_rounds(size_t rounds, float* sink) {
    __m512 sums[chains];
    for (size_t c = 0; c < chains; ++c) sums[c] = _mm512_set1_ps(unknown(static_cast<float>(c)));
    // 2^-100 squared is nothing beside the sums.
    const __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(unknown(7.888609e-31f)), _mm512_set1_ps(unknown(7.888609e-31f)));
    for (size_t r = 0; r < rounds; ++r)
        for (size_t i = 0; i < unrolled; ++i)
            for (size_t c = 0; c < chains; ++c) sums[c] = _mm512_dpbf16_ps(sums[c], a, a);
    for (size_t c = 1; c < chains; ++c) sums[0] = _mm512_add_ps(sums[0], sums[c]);
    *sink = sum(f32x16{sums[0]});
    return 2.0 * static_cast<double>(rounds * unrolled * chains * 2 * lanes);
}
#else
// Without an instruction for them, bfloat16 numbers are widened and multiplied in float32.
double bf16_rounds(size_t rounds, float* sink) { return float32_rounds(rounds, sink); }
#endif

#endif

double of_kind(PeakKind kind, size_t rounds, float* sink) {
    switch (kind) {
        case PeakKind::float32: return float32_rounds(rounds, sink);
        case PeakKind::bf16: return bf16_rounds(rounds, sink);
        case PeakKind::int8: return int8_rounds(rounds, sink);
    }
    return 0.0;
}

}  // namespace

double peak(PeakKind kind, size_t rounds, float* sinks) noexcept {
    // As many blocks as threads, each the same work: who finishes early would only take another's whole block.
    const size_t blocks = threads();
    double done[peak_sinks];
    const size_t counted = blocks < peak_sinks ? blocks : peak_sinks;
    parallel(counted, 1, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) done[i] = of_kind(kind, rounds, sinks + i);
    });
    double all = 0.0;
    for (size_t i = 0; i < counted; ++i) all += done[i];
    return all;
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
