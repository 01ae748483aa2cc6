// How much memory an op needs beside its operands; the wrapper brings it.
#include "formats.h"

namespace nemotron_h {

size_t panel_bytes(Format format, size_t cols, size_t group) noexcept { return PanelLayout(format, cols, group).bytes; }

size_t linear_scratch(size_t M, size_t K, Format format, Arithmetic arithmetic) noexcept {
    return rows_bytes(M, K, takes_float(format, arithmetic));
}

size_t experts_scratch(size_t M, size_t k, size_t E, size_t L, size_t F, Format format, Arithmetic arithmetic) noexcept {
    const size_t V = M * k;
    const bool wide = takes_float(format, arithmetic);
    return padded((3 * V + 2 * E + 1) * sizeof(size_t)) + padded(E * sizeof(size_t)) + rows_bytes(M, L, wide) +
           rows_bytes(V, F, wide) + padded(V * F * sizeof(float)) + padded(V * L * sizeof(float));
}

}  // namespace nemotron_h
