// Time steps of the state space, clamp(softplus(dt + bias), low, high), and its rates of decay, -exp(A_log).
//
// A token has as many as heads, 64 in a 30B model, some 40 ns each: in double, by the C library, since a relative error
// of a step is one of the state's memory. softplus(v) = max(v, 0) + log1p(exp(-|v|)) keeps its digits at both ends.
#include "../kernels.h"
#include "../pool.h"
#include "../simd.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {
namespace {

constexpr size_t small_call = 256;  // elements

float element(const void* p, Dtype dtype, size_t at) {
    if (dtype == Dtype::float32) return static_cast<const float*>(p)[at];
    const uint32_t bits = static_cast<uint32_t>(static_cast<const bf16*>(p)[at].bits) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

// Comparisons that are false for NaN, which therefore stays.
float step(double v, float low, float high) {
    float softplus = static_cast<float>((v > 0.0 ? v : 0.0) + __builtin_log1p(__builtin_exp(v > 0.0 ? -v : v)));
    softplus = softplus < low ? low : softplus;
    return softplus > high ? high : softplus;
}

}  // namespace

void time_step(const void* dt, const void* bias, float* out, size_t batch, size_t T, size_t H, size_t dt_batch,
               size_t dt_token, float low, float high, Dtype dt_dtype, Dtype bias_dtype) noexcept {
    const size_t count = batch * T * H, grain = count < small_call ? count : small_call / 4;
    parallel(count, grain, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
            const size_t h = i % H, t = i / H % T, b = i / H / T;
            const double v = element(dt, dt_dtype, b * dt_batch + t * dt_token + h);
            out[i] = step(v + element(bias, bias_dtype, h), low, high);
        }
    });
}

void decay_rate(const void* A_log, float* A, size_t H, Dtype dtype) noexcept {
    for (size_t h = 0; h < H; ++h) A[h] = -static_cast<float>(__builtin_exp(element(A_log, dtype, h)));
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
