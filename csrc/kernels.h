// Every kernel of the package, on one screen.
//
// A kernel sees raw pointers and sizes, never a tensor: the Python wrapper (src/nemotron_h/ops/<op>/native.py) has
// checked shapes, dtypes and strides, so a kernel neither validates nor throws. Each file in kernels/ is compiled once
// per level, into the namespace of that level; isa.cpp gathers them in one table of function pointers per level.
//
// Contract of all kernels: the bits of the result depend on the values alone, not on the level, the number of rows, the
// alignment or the strides. That is what lets one machine check another, and a decode step repeat a prefill.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nemotron_h {

// Raised whenever a signature below changes; src/nemotron_h/ops/_native.py refuses a library with another number.
constexpr int interface_version = 1;

// Totally ordered: a CPU that has one level has all the lower ones.
enum class Level : int { generic = 0, avx2 = 1, avx512 = 2, amx = 3 };
constexpr int level_count = 4;

enum class Dtype : int { float32 = 0, bfloat16 = 1 };

// out[r, c] = weight[c] · x[r, c] / sqrt(mean over c of x[r, c]² + eps), float32 inside, rounded once to x's dtype.
// x: rows × cols with x_row_stride elements from row to row; weight: cols; out: rows × cols, contiguous. cols ≥ 1.
using RmsNorm = void(const void* x, const void* weight, void* out, size_t rows, size_t cols, size_t x_row_stride,
                     float eps, Dtype x_dtype, Dtype weight_dtype) noexcept;

struct Kernels {
    RmsNorm* rms_norm;
};

#define NEMOTRON_H_DECLARE_KERNELS(level) \
    namespace level {                     \
    RmsNorm rms_norm;                     \
    }
NEMOTRON_H_DECLARE_KERNELS(generic)
NEMOTRON_H_DECLARE_KERNELS(avx2)
NEMOTRON_H_DECLARE_KERNELS(avx512)

// isa.cpp
struct CpuFeatures {
    bool avx2, fma, avx512f, avx512bw, avx512dq, avx512vl, avx512_vnni, avx512_bf16;
    bool amx_tile, amx_int8, amx_bf16, amx_permission;  // permission: the kernel has granted this process the tile state
};
const CpuFeatures& cpu_features() noexcept;
Level highest_level() noexcept;
const Kernels& kernels_of(Level level) noexcept;  // level must not exceed highest_level()

}  // namespace nemotron_h
