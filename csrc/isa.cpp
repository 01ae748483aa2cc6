// What this CPU and this operating system let us run, and the kernels that go with it.
//
// CPUID says what the silicon has; XGETBV says which registers the operating system saves on a context switch. An
// instruction set is usable only with both: a hypervisor may show AVX-512 in CPUID and not save the registers. Matrix
// units must be asked for as well, and prove themselves (kernels/tile_check.cpp).
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace nemotron_h {
namespace {

#if defined(__x86_64__)
uint64_t saved_register_state() noexcept {
    uint32_t low, high;
    // By hand, since the intrinsic needs -mxsave and this file is compiled for every CPU.
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<uint64_t>(high) << 32) | low;
}

bool request_tile_permission() noexcept {
#if defined(__linux__) && defined(SYS_arch_prctl)
    // Linux hands out the 8 KB tile state on request only, once per process (arch/x86: ARCH_REQ_XCOMP_PERM, XTILEDATA).
    constexpr long arch_req_xcomp_perm = 0x1023, xtiledata = 18;
    return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xtiledata) == 0;
#else
    return false;
#endif
}
#endif

bool has_avx512(const CpuFeatures& f) noexcept {
    return f.avx2 && f.fma && f.avx512f && f.avx512bw && f.avx512dq && f.avx512vl && f.avx512_vnni && f.avx512_bf16;
}

#if defined(NEMOTRON_H_TILE_KERNELS)
bool may_use_tiles([[maybe_unused]] const CpuFeatures& f) noexcept {
#if defined(NEMOTRON_H_EMULATE_TILES)
    return true;
#else
    return f.amx_tile && f.amx_int8 && f.amx_bf16 && f.amx_permission;
#endif
}
#endif

CpuFeatures detect() noexcept {
    CpuFeatures f{};
#if defined(__x86_64__)
    unsigned a, b, c, d;
    auto bit = [](unsigned word, int position) { return ((word >> position) & 1u) != 0; };
    if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return f;  // 27: OSXSAVE, without which xgetbv would trap
    const bool has_fma = bit(c, 12) && bit(c, 29);  // 29: F16C, which came to CPUs before FMA
    const uint64_t state = saved_register_state();
    const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6, tiles = (state & 0x60000) == 0x60000;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
    const unsigned subleaves = a;
    f.fma = ymm && has_fma;
    f.avx2 = ymm && bit(b, 5);
    f.avx512f = zmm && bit(b, 16);
    f.avx512dq = zmm && bit(b, 17);
    f.avx512bw = zmm && bit(b, 30);
    f.avx512vl = zmm && bit(b, 31);
    f.avx512_vnni = zmm && bit(c, 11);
    f.amx_bf16 = tiles && bit(d, 22);
    f.amx_tile = tiles && bit(d, 24);
    f.amx_int8 = tiles && bit(d, 25);
    if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) f.avx512_bf16 = zmm && bit(a, 5);
    f.amx_permission = f.amx_tile && request_tile_permission();
#if defined(NEMOTRON_H_TILE_KERNELS)
    f.amx_works = has_avx512(f) && may_use_tiles(f) && amx::tiles_work();
#endif
#endif
    return f;
}

// Measured with int4 panels, two threads. Intel with AMX: 2 KB ahead 34 GB/s, 4 KB 31, 8 KB 31, none 29. AMD Zen 5: 2 KB
// 41, 4 KB 62, 6 to 8 KB 62 to 67, 12 KB 46, none 36.
size_t best_read_ahead() noexcept {
#if defined(__x86_64__)
    unsigned a, b, c, d;
    if (__get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx) return 2048;
#endif
    return 6144;
}

#define NEMOTRON_H_GENERIC(type, name) generic::name,
constexpr Kernels generic_kernels = {NEMOTRON_H_KERNELS(NEMOTRON_H_GENERIC)};
#if defined(__x86_64__)
#define NEMOTRON_H_AVX2(type, name) avx2::name,
#define NEMOTRON_H_AVX512(type, name) avx512::name,
constexpr Kernels avx2_kernels = {NEMOTRON_H_KERNELS(NEMOTRON_H_AVX2)};
constexpr Kernels avx512_kernels = {NEMOTRON_H_KERNELS(NEMOTRON_H_AVX512)};

// The scan of a prompt and its attention multiply matrices too, but what they multiply is float32, in chains of fused
// multiply-adds that every level has. The units take bfloat16: a float32 would have to go through them in two parts, which
// gives bits that no other level has. The step of a whole block, of at most 32 rows, calls avx512's products.
#if defined(NEMOTRON_H_TILE_KERNELS)
constexpr Kernels with_tiles(Kernels kernels) {
    kernels.linear = amx::linear;
    kernels.experts = amx::experts;
    kernels.peak = amx::peak;
    return kernels;
}
constexpr Kernels amx_kernels = with_tiles(avx512_kernels);
#else
constexpr Kernels amx_kernels = avx512_kernels;  // never asked for
#endif
#endif

}  // namespace

const size_t read_ahead = best_read_ahead();

#if !defined(NEMOTRON_H_TILE_KERNELS)
const char* const tile_kernels = "none";
#elif defined(NEMOTRON_H_EMULATE_TILES)
const char* const tile_kernels = "emulation";
#else
const char* const tile_kernels = "instructions";
#endif

const CpuFeatures& cpu_features() noexcept {
    static const CpuFeatures features = detect();
    return features;
}

Level highest_level() noexcept {
    const CpuFeatures& f = cpu_features();
    if (!(f.avx2 && f.fma)) return Level::generic;
    if (!has_avx512(f)) return Level::avx2;
    return f.amx_works ? Level::amx : Level::avx512;
}

const Kernels& kernels_of([[maybe_unused]] Level level) noexcept {
#if defined(__x86_64__)
    switch (level) {
        case Level::generic: return generic_kernels;
        case Level::avx2: return avx2_kernels;
        case Level::avx512: return avx512_kernels;
        case Level::amx: return amx_kernels;
    }
#endif
    return generic_kernels;
}

}  // namespace nemotron_h
