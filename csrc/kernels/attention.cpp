// Attention of a few queries to many keys: softmax(q·kᵀ · d^-1/2) v, grouped-query, a block of 256 keys at a time.
//
// All rows (queries times the R query heads) of a key head visit a block together, so keys and values are read from
// memory once: 4·d bytes a key in bfloat16. The arithmetic is 2·d·rows fused multiply-adds a key; with 16 rows and
// d = 128 that is twice the time of the memory (attention_products.h).
// The items of the pool are (batch, key head, block); each leaves for every row the largest score m, the sum s of
// exp(score - m) and the weighted values (attention_block.h). A second region puts a row's blocks together, in order.
#include "../pool.h"
#include "attention_block.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {
namespace {

constexpr size_t max_rows = panel;  // rows that visit a block together; more take turns, with the block in L2

// What one thread needs for one block, some 100 KB; with d = 128 and 16 rows it touches 40 of them, which is L1's.
struct Buffers {
    alignas(64) float scores[max_rows * block];
    alignas(64) float floats[tile * (max_size + 4)];
    alignas(64) float q[(max_size + 4) * panel];
    alignas(64) float factor[block];
};

struct Partial {
    float *stats, *acc;
};

// Where item (batch, key head, block) leaves its rows: all (m, s) pairs first, then all weighted values.
Partial partial(const AttentionShape& a, float* scratch, size_t items, size_t item) {
    const size_t rows = a.queries * a.repeats;
    return {scratch + 2 * item * rows, scratch + padded(2 * items * rows) + item * rows * padded(a.size)};
}

template <typename Q, typename T>
void attend_block(const Call<Q, T>& call, size_t items, size_t item) {
    const AttentionShape& a = call.a;
    const size_t blocks = (a.keys + block - 1) / block, rows = a.queries * a.repeats;
    const size_t first = item % blocks * block, head = item / blocks % a.heads, batch = item / blocks / a.heads;
    const Partial to = partial(a, call.scratch, items, item);
    Sight sight;
    if (!look(a, call.visible, batch, first, 0, a.queries, sight)) {
        for (size_t r = 0; r < rows; ++r) to.stats[2 * r] = -infinity;
        return;
    }
    Buffers buffers;
    const Work work{buffers.scores, buffers.floats, buffers.q, buffers.factor};
    const auto visit = Visit<T>::of(call, batch, head, first, sight, work);
    for (size_t begin = 0; begin < rows; begin += max_rows) {
        const size_t end = begin + max_rows < rows ? begin + max_rows : rows;
        take_queries(call, batch, head, begin, end, work.q);
        visit.run(begin, end, to.stats + 2 * begin, to.acc + begin * padded(a.size));
    }
}

// Output row `index` of [batch][query][query head]: its blocks, one after the other, wherever they were computed.
template <typename Q, typename T>
void combine(const Call<Q, T>& call, size_t items, size_t index) {
    const AttentionShape& a = call.a;
    const size_t blocks = (a.keys + block - 1) / block, query_heads = a.heads * a.repeats;
    const size_t head = index % query_heads, t = index / query_heads % a.queries;
    const size_t batch = index / query_heads / a.queries;
    const size_t row = t * a.repeats + head % a.repeats, first = (batch * a.heads + head / a.repeats) * blocks;
    const size_t width = padded(a.size);
    float stats[2], acc[max_size];
    start(stats, acc, width);
    for (size_t i = 0; i < blocks; ++i) {
        const Partial from = partial(a, call.scratch, items, first + i);
        merge(stats, acc, from.stats + 2 * row, from.acc + row * width, width);
    }
    finish(stats, acc, a.size, call.out + index * a.size);
}

template <typename Q, typename T>
void attend(const Call<Q, T>& call) {
    const AttentionShape& a = call.a;
    const size_t items = a.batch * a.heads * ((a.keys + block - 1) / block);
    parallel(items, 1, [&](size_t begin, size_t end) {
        for (size_t item = begin; item < end; ++item) attend_block(call, items, item);
    });
    parallel(a.batch * a.queries * a.heads * a.repeats, 4, [&](size_t begin, size_t end) {
        for (size_t index = begin; index < end; ++index) combine(call, items, index);
    });
}

}  // namespace

void attention(const AttentionShape* shape, const void* q, Dtype q_dtype, const void* k, const void* v, Dtype kv_dtype,
               const float* k_scale, const float* v_scale, const uint8_t* visible, float* scratch, void* out) noexcept {
    const Untyped untyped{shape, q, q_dtype, k, v, kv_dtype, k_scale, v_scale, visible, scratch, out};
    untyped.call([](const auto& call) { attend(call); });
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
