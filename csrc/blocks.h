// What the step of a whole block reads (kernels/block_step.cpp). Every field has 8 bytes and stands in the order in which
// src/nemotron_h/ops/block_step/native.py lists it: Python fills a struct once and hands over its address at every step.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nemotron_h {

struct Matrix {  // of a linear layer, as `Linear` takes it
    const void* data;
    uint64_t format, stride, rows, cols, group, scale_type, arithmetic;
    const void* bias;
    uint64_t bias_dtype;
};

struct BlockNorm {
    const void* weight;
    uint64_t dtype, size;
    double eps;
};

struct MambaBlock {
    BlockNorm norm;
    Matrix in_proj, out_proj;
    const void *conv_weight, *conv_bias, *dt_bias, *A_log, *D, *norm_weight;
    uint64_t conv_dtype, bias_dtype, dt_bias_dtype, A_dtype, D_dtype, norm_dtype;
    uint64_t H, P, G, N, K;
    double low, high, eps;
};

struct AttentionBlock {
    BlockNorm norm;
    Matrix q, k, v, o;
};

struct MlpBlock {
    BlockNorm norm;
    Matrix up, down;
};

struct MoeBlock {
    BlockNorm norm;
    const void* router_weight;
    const float* router_bias;
    uint64_t router_dtype, E, top_k, n_group, topk_group, norm_topk;
    double scaling;
    const void *up, *down;
    const float *up_bias, *down_bias;
    uint64_t up_bytes, down_bytes, format, group, scale_type, arithmetic, L, F;
    Matrix fc1, fc2, shared_up, shared_down;  // data is null where the model has none
};

// Bytes of scratch for so many rows, 64-byte aligned.
size_t block_scratch(const MambaBlock& block, size_t rows) noexcept;
size_t block_scratch(const AttentionBlock& block, size_t rows) noexcept;  // of either of its two kernels
size_t block_scratch(const MlpBlock& block, size_t rows) noexcept;
size_t block_scratch(const MoeBlock& block, size_t rows) noexcept;

}  // namespace nemotron_h
