// How much memory an op needs beside its operands; the wrapper brings it.
#include "blocks.h"
#include "formats.h"

namespace nemotron_h {

namespace {

constexpr size_t larger(size_t a, size_t b) { return a > b ? a : b; }

}  // namespace

size_t panel_bytes(Format format, size_t cols, size_t group) noexcept { return PanelLayout(format, cols, group).bytes; }

size_t linear_scratch(size_t M, size_t K, Format format, Arithmetic arithmetic) noexcept {
    return rows_bytes(M, K, takes_float(format, arithmetic));
}

size_t experts_scratch(size_t M, size_t k, size_t E, size_t L, size_t F, Format format, Arithmetic arithmetic) noexcept {
    M = M < experts_piece ? M : experts_piece;
    const size_t V = M * k;
    const bool wide = takes_float(format, arithmetic);
    return padded((4 * V + 1 + E) * sizeof(size_t)) + rows_bytes(M, L, wide) +
           rows_bytes(V, F, wide) + padded(V * F * sizeof(float)) +
           larger(padded(V * L * sizeof(float)), rows_bytes(V, L, wide));  // one after the other in one place
}

namespace {

size_t scratch_of(const Matrix& m, size_t rows) {
    return m.data == nullptr ? 0 : linear_scratch(rows, m.cols, static_cast<Format>(m.format), static_cast<Arithmetic>(m.arithmetic));
}

constexpr size_t widest = 4;  // bytes of an activation: one size for both dtypes

}  // namespace

// kernels/block_step.cpp takes these pieces in this order; its parts run one after the other in what is left.
size_t block_scratch(const MambaBlock& b, size_t rows) noexcept {
    const size_t inner = b.H * b.P, channels = inner + 2 * b.G * b.N;
    const size_t step = 4 * rows * (channels + b.H + inner) + 256;  // as `MambaStep` says
    return padded(rows * b.norm.size * widest) + padded(rows * b.in_proj.rows * widest) + padded(rows * inner * widest) +
           padded(b.H * sizeof(float)) + larger(step, larger(scratch_of(b.in_proj, rows), scratch_of(b.out_proj, rows)));
}

size_t block_scratch(const AttentionBlock& b, size_t rows) noexcept {
    const size_t ins = larger(scratch_of(b.q, rows), larger(scratch_of(b.k, rows), scratch_of(b.v, rows)));
    return padded(rows * b.norm.size * widest) + larger(ins, scratch_of(b.o, rows));
}

size_t block_scratch(const MlpBlock& b, size_t rows) noexcept {
    return padded(rows * b.norm.size * widest) + padded(rows * b.up.rows * widest) +
           larger(scratch_of(b.up, rows), scratch_of(b.down, rows));
}

size_t block_scratch(const MoeBlock& b, size_t rows) noexcept {
    const size_t routing = padded(rows * b.top_k * sizeof(int64_t)) + padded(rows * b.top_k * sizeof(float)) +
                           padded(rows * b.E * sizeof(float));
    const size_t latent = b.fc1.data == nullptr ? 0 : 2 * padded(rows * b.L * widest);
    const size_t shared = b.shared_up.data == nullptr ? 0 : padded(rows * b.shared_up.rows * widest);
    const size_t linears = larger(larger(scratch_of(b.fc1, rows), scratch_of(b.fc2, rows)),
                                  larger(scratch_of(b.shared_up, rows), scratch_of(b.shared_down, rows)));
    return 2 * padded(rows * b.norm.size * widest) + routing + latent + shared +
           larger(linears, experts_scratch(rows, b.top_k, b.E, b.L, b.F, static_cast<Format>(b.format),
                                           static_cast<Arithmetic>(b.arithmetic)));
}

}  // namespace nemotron_h
