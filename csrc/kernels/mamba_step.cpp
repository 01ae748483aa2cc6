// Everything between a Mamba-2 mixer's two projections, for a few tokens: the kernels of its parts, one after the other.
//
// Nothing is computed here. The parts take some 70 µs of a Nano-30B layer, nearly all of it the state's 2 MiB in and out;
// five calls from Python with their checks would add as much again.
#include "../formats.h"
#include "../kernels.h"
#include "../pool.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {

void mamba_step(const void* projected, const void* conv_weight, const void* conv_bias, const void* dt_bias,
                const float* A, const void* D, const void* norm_weight, const void* window, const void* state,
                void* out_state, void* out, void* new_window, size_t batch, size_t T, size_t H, size_t P, size_t G,
                size_t N, size_t K, size_t window_batch, size_t window_channel, size_t window_step, float low, float high,
                float eps, Dtype dtype, Dtype conv_dtype, Dtype bias_dtype, Dtype dt_bias_dtype, Dtype D_dtype,
                Dtype norm_dtype, Dtype state_dtype, Dtype out_dtype, void* inputs, void* convolved, float* steps,
                void* scratch) noexcept {
    const size_t inner = H * P, C = inner + 2 * G * N, row = inner + C + H, rows = batch * T;
    const size_t size = dtype == Dtype::float32 ? 4 : 2;
    const auto at = [size](const void* p, size_t elements) { return static_cast<const char*>(p) + elements * size; };
    char* work = static_cast<char*>(scratch);
    void* xBC = inputs == nullptr ? work : convolved;
    work += padded(rows * C * size);
    float* dt = inputs == nullptr ? reinterpret_cast<float*>(work) : steps;
    float* y = reinterpret_cast<float*>(work += padded(rows * H * sizeof(float)));
    if (inputs != nullptr)
        for (size_t r = 0; r < rows; ++r)
            __builtin_memcpy(static_cast<char*>(inputs) + r * C * size, at(projected, r * row + inner), C * size);

    causal_conv1d(at(projected, inner), conv_weight, conv_bias, window, nullptr, nullptr, xBC, new_window, batch, T, C, K, T * row, row,
                  window_batch, window_channel, window_step, dtype, conv_dtype, bias_dtype);
    time_step(at(projected, inner + C), dt_bias, dt, batch, T, H, T * row, row, low, high, dtype, dt_bias_dtype);
    ssd_step(xBC, dt, A, at(xBC, inner), at(xBC, inner + G * N), D, state, out_state, y, batch, T, H, P, G, N, T * C, C,
             P, T * C, C, N, T * C, C, N, dtype, D_dtype, state_dtype, out_dtype);
    gated_rms_norm(y, projected, norm_weight, out, rows, G, inner / G, inner, row, eps, Dtype::float32, dtype, norm_dtype);
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
