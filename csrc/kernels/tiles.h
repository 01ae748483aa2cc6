// The matrix units: eight registers of up to 16 rows of 64 bytes, and the instructions that multiply them.
//
// A product is C += A · B. A holds a row of activations in each row: 64 k as int8, 32 as bfloat16. B holds 16 outputs in
// 16 lanes, and in its row j what each of them has for k = 4j .. 4j + 3 (bfloat16: 2j and 2j + 1). C: 16 sums, int32 or
// float32, for each row of A. Sums of integers are exact. Those of bfloat16 are: an even and an odd chain of fused
// multiply-adds over the 32 k from zero, then C + (even + odd), subnormals as zero, whatever MXCSR says.
//
// Two implementations. The instructions are written as assembler, since gcc's intrinsics do not tell the compiler that a
// tile load reads memory: it may drop the stores that fill it. With NEMOTRON_H_EMULATE_TILES software does the same, for
// tests on CPUs without tiles: it reads and writes exactly the bytes that the instructions would, which
// AddressSanitizer then sees, and it stops the process where they would fault.
#pragma once

#include "../pool.h"
#include "../simd_int.h"

#if defined(__AMX_TILE__) || defined(NEMOTRON_H_EMULATE_TILES)
#define NEMOTRON_H_TILES 1

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {

constexpr size_t tile_height = 16, tile_width = 64;  // rows, bytes

// What the registers hold: C in 0-3, A in 4 and 5, B in 6 and 7. ldtilecfg reads the struct as it lies here.
constexpr int tile_c = 0, tile_a = 4, tile_b = 6, tile_count = 8;
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    // A and C have `height` rows: a tile load reads as many and no more.
    explicit constexpr TileShapes(size_t height) {
        for (int i = 0; i < tile_count; ++i) {
            row_bytes[i] = tile_width;
            rows[i] = static_cast<uint8_t>(i < tile_b ? height : tile_height);
        }
    }
};
static_assert(sizeof(TileShapes) == 64, "as ldtilecfg has it");

#if !defined(NEMOTRON_H_EMULATE_TILES)

inline void tiles_configure(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" : : "m"(shapes)); }
inline void tiles_release() { __asm__ volatile("tilerelease"); }
template <int T>
inline void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int T>
inline void tile_load(const void* p, size_t stride) {  // bytes from row to row
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* p, size_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
inline void tile_dot_bytes() {  // both signed
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
inline void tile_dot_bf16() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#else

struct TileFile {
    bool configured = false;
    TileShapes shapes{0};
    alignas(64) uint8_t at[tile_count][tile_height][tile_width] = {};
};
inline thread_local TileFile tile_file;

inline void must(bool legal) {
    if (!legal) __builtin_trap();
}
inline void tiles_release() { tile_file = TileFile{}; }
inline void tiles_configure(const TileShapes& shapes) {
    tiles_release();
    tile_file.shapes = shapes;
    tile_file.configured = true;
    for (int i = 0; i < tile_count; ++i)
        must(shapes.rows[i] >= 1 && shapes.rows[i] <= tile_height && shapes.row_bytes[i] <= tile_width);
}
template <int T>
inline void tile_zero() {
    must(tile_file.configured);
    __builtin_memset(tile_file.at[T], 0, sizeof tile_file.at[T]);
}
template <int T>
inline void tile_load(const void* p, size_t stride) {
    tile_zero<T>();
    for (size_t r = 0; r < tile_file.shapes.rows[T]; ++r)
        __builtin_memcpy(tile_file.at[T][r], static_cast<const char*>(p) + r * stride, tile_file.shapes.row_bytes[T]);
}
template <int T>
inline void tile_store(void* p, size_t stride) {
    must(tile_file.configured);
    for (size_t r = 0; r < tile_file.shapes.rows[T]; ++r)
        __builtin_memcpy(static_cast<char*>(p) + r * stride, tile_file.at[T][r], tile_file.shapes.row_bytes[T]);
}

template <int C, int A, int B>
inline void must_fit() {
    const TileShapes& s = tile_file.shapes;
    must(tile_file.configured && s.rows[C] == s.rows[A] && s.row_bytes[C] == s.row_bytes[B] && s.row_bytes[A] == 4 * s.rows[B]);
}
inline int32_t word_of(const uint8_t* row, size_t k) {
    int32_t word;
    __builtin_memcpy(&word, row + 4 * k, sizeof word);
    return word;
}

// vpdpbusd takes one factor unsigned: B + 128, and 128 · Σ of A's bytes less.
template <int C, int A, int B>
inline void tile_dot_bytes() {
    must_fit<C, A, B>();
    const __m512i bias = _mm512_set1_epi8(static_cast<char>(0x80));
    for (size_t r = 0; r < tile_file.shapes.rows[C]; ++r) {
        __m512i sum = _mm512_load_si512(tile_file.at[C][r]), excess = _mm512_setzero_si512();
        for (size_t k = 0; k < tile_file.shapes.rows[B]; ++k) {
            const __m512i a = _mm512_set1_epi32(word_of(tile_file.at[A][r], k)), b = _mm512_load_si512(tile_file.at[B][k]);
            sum = _mm512_dpbusd_epi32(sum, _mm512_xor_si512(b, bias), a);
            excess = _mm512_dpbusd_epi32(excess, bias, a);
        }
        _mm512_store_si512(tile_file.at[C][r], _mm512_sub_epi32(sum, excess));
    }
}

template <int C, int A, int B>
inline void tile_dot_bf16() {
    must_fit<C, A, B>();
    const FlushSubnormals flush;
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    const auto first = [&](__m512i w) { return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)); };
    const auto second = [&](__m512i w) { return _mm512_castsi512_ps(_mm512_and_si512(w, high)); };
    for (size_t r = 0; r < tile_file.shapes.rows[C]; ++r) {
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        for (size_t k = 0; k < tile_file.shapes.rows[B]; ++k) {
            const __m512i a = _mm512_set1_epi32(word_of(tile_file.at[A][r], k)), b = _mm512_load_si512(tile_file.at[B][k]);
            even = _mm512_fmadd_ps(first(a), first(b), even);
            odd = _mm512_fmadd_ps(second(a), second(b), odd);
        }
        float* c = reinterpret_cast<float*>(tile_file.at[C][r]);
        _mm512_store_ps(c, _mm512_add_ps(_mm512_load_ps(c), _mm512_add_ps(even, odd)));
    }
}

#endif

// The registers belong to a thread. Given back at the end, they cost nothing at a context switch.
class Tiles {
  public:
    explicit Tiles(size_t height) { tiles_configure(TileShapes(height)); }
    ~Tiles() { tiles_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
#endif
