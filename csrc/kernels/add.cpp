// The sum of two rows of numbers, as the residual stream takes it: float32 inside, rounded once.
//
// There is nothing to tune but where it runs. The bound is memory: 3 · 2 bytes an element of bfloat16, and 512 tokens of 2688
// channels are 8 MB. PyTorch would hand so many to OpenMP, whose threads go on spinning for milliseconds after the last
// element, on the cores on which our pool is to multiply by then.
//
// Unlike the products, a sum keeps subnormal numbers, as PyTorch does and as a block's step does outside the pool.
#include "../kernels.h"
#include "../pool.h"
#include "../simd.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {
namespace {

constexpr size_t grain = 1 << 14;      // elements: some microseconds
constexpr size_t small_call = 1 << 16;  // below it, waking a thread takes longer

template <typename X, typename Y>
void sum_of(const X* x, const Y* y, X* out, size_t count) {
    const KeepSubnormals keep;
    size_t i = 0;
    for (; i + lanes <= count; i += lanes) store(out + i, add(load(x + i), load(y + i)));
    const size_t rest = count - i;
    if (rest) store(out + i, add(load(x + i, rest), load(y + i, rest)), rest);
}

template <typename X, typename Y>
void sum_on_pool(const void* x, const void* y, void* out, size_t count) {
    const X* a = static_cast<const X*>(x);
    const Y* b = static_cast<const Y*>(y);
    X* to = static_cast<X*>(out);
    parallel(count, count < small_call ? small_call : grain,
             [&](size_t begin, size_t end) { sum_of(a + begin, b + begin, to + begin, end - begin); });
}

}  // namespace

void add(const void* x, const void* y, void* out, size_t count, Dtype x_dtype, Dtype y_dtype) noexcept {
    if (x_dtype == Dtype::bfloat16) return sum_on_pool<bf16, bf16>(x, y, out, count);
    if (y_dtype == Dtype::bfloat16) return sum_on_pool<float, bf16>(x, y, out, count);
    sum_on_pool<float, float>(x, y, out, count);
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
