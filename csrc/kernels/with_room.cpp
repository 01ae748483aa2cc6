// Keys and values of a prompt, laid out for the cache: x in front, zeros behind.
//
// A projection writes token after token, each with its heads; the cache holds head after head, each with its tokens, and has
// room for more. A copy of rows of some 256 bytes each, bound by memory, on the pool: after a copy by OpenMP its threads
// would spin on the cores that attention needs next.
#include "../kernels.h"
#include "../pool.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {
namespace {

constexpr size_t block_bytes = 1 << 15, small_call = 1 << 17;

}  // namespace

void with_room(const void* x, void* out, size_t batch, size_t heads, size_t T, size_t slots, size_t row, size_t x_batch,
               size_t x_head, size_t x_token) noexcept {
    const char* from = static_cast<const char*>(x);
    char* to = static_cast<char*>(out);
    const size_t count = batch * heads * slots, rows = row < block_bytes ? block_bytes / row : 1;
    parallel(count, count * row < small_call ? count : rows, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
            const size_t t = i % slots, h = i / slots % heads, b = i / slots / heads;
            if (t < T) __builtin_memcpy(to + i * row, from + b * x_batch + h * x_head + t * x_token, row);
            else __builtin_memset(to + i * row, 0, row);
        }
    });
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
