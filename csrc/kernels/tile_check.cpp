// Do the matrix units multiply as we think? One product of each kind by the instructions and by plain loops. isa.cpp asks
// before it offers the level: a hypervisor, an emulator or a CPU to come may announce tiles and have another order of
// additions, and then bits would depend on the machine.
#include "../formats.h"
#include "tiles.h"

#if defined(NEMOTRON_H_TILES)
namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {
namespace {

struct Draw {
    uint64_t state = 1;
    uint32_t bits() {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        return static_cast<uint32_t>(state >> 32);
    }
};

float value(uint16_t bits) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float a;
    __builtin_memcpy(&a, &word, sizeof a);
    return a;
}

// Exponents around 1, and some so small that factors, products and sums are subnormal: they must count as zero.
uint16_t draw_bf16(Draw& draw) {
    const uint32_t r = draw.bits(), exponent = r % 8 == 0 ? r >> 8 & 1 : r % 8 == 1 ? 63 + (r >> 8 & 3) : 120 + (r >> 8 & 15);
    return static_cast<uint16_t>((r >> 16 & 0x807f) | exponent << 7);
}

constexpr size_t distance = 80;  // of A's rows: not a whole tile

template <typename Sum>
struct Operands {
    alignas(64) uint8_t a[tile_height * distance], b[tile_height * tile_width];
    alignas(64) Sum c[tile_height * lanes], found[tile_height * lanes];
};

bool same(const void* a, const void* b, size_t bytes) { return __builtin_memcmp(a, b, bytes) == 0; }

bool bytes_work(size_t height, Draw& draw) {
    Operands<int32_t> t;
    for (uint8_t& byte : t.a) byte = static_cast<uint8_t>(draw.bits());
    for (uint8_t& byte : t.b) byte = static_cast<uint8_t>(draw.bits());
    for (int32_t& sum : t.c) sum = static_cast<int32_t>(draw.bits()) / 2;
    __builtin_memcpy(t.found, t.c, sizeof t.c);
    {
        const Tiles tiles(height);
        tile_load<tile_c>(t.c, tile_width);
        tile_load<tile_a>(t.a, distance);
        tile_load<tile_b>(t.b, tile_width);
        tile_dot_bytes<tile_c, tile_a, tile_b>();
        tile_store<tile_c>(t.found, tile_width);
    }
    for (size_t r = 0; r < height; ++r)
        for (size_t n = 0; n < lanes; ++n)
            for (size_t k = 0; k < tile_width; ++k)
                t.c[r * lanes + n] += static_cast<int8_t>(t.a[r * distance + k]) * static_cast<int8_t>(t.b[k / 4 * 64 + n * 4 + k % 4]);
    return same(t.c, t.found, sizeof t.c);
}

bool floats_work(size_t height, Draw& draw) {
    const FlushSubnormals flush;
    Operands<float> t;
    uint16_t a[tile_height][tile_cols], b[tile_cols][lanes];
    for (size_t k = 0; k < tile_cols; ++k) {
        for (size_t r = 0; r < tile_height; ++r) {
            a[r][k] = draw_bf16(draw);
            __builtin_memcpy(t.a + r * distance + 2 * k, &a[r][k], 2);
        }
        for (size_t n = 0; n < lanes; ++n) {
            b[k][n] = draw_bf16(draw);
            __builtin_memcpy(t.b + k / 2 * 64 + n * 4 + k % 2 * 2, &b[k][n], 2);
        }
    }
    for (float& sum : t.c) sum = value(draw_bf16(draw));
    __builtin_memcpy(t.found, t.c, sizeof t.c);
    {
        const Tiles tiles(height);
        tile_load<tile_c + 3>(t.c, tile_width);
        tile_load<tile_a + 1>(t.a, distance);
        tile_load<tile_b + 1>(t.b, tile_width);
        tile_dot_bf16<tile_c + 3, tile_a + 1, tile_b + 1>();
        tile_store<tile_c + 3>(t.found, tile_width);
    }
    for (size_t r = 0; r < height; ++r)
        for (size_t n = 0; n < lanes; ++n) {
            float chain[2] = {0.0f, 0.0f};
            for (size_t k = 0; k < tile_cols; ++k) chain[k % 2] = __builtin_fmaf(value(a[r][k]), value(b[k][n]), chain[k % 2]);
            t.c[r * lanes + n] += chain[0] + chain[1];
        }
    return same(t.c, t.found, sizeof t.c);
}

}  // namespace

bool tiles_work() noexcept {
    Draw draw;
    for (size_t height = 1; height <= tile_height; height += 5)
        if (!bytes_work(height, draw) || !floats_work(height, draw)) return false;
    return true;
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
#endif
