// Attention of many queries: the same arithmetic as attention.cpp, bit for bit, in another order of work.
//
// Here the multipliers are the bound: 2·d multiply-adds a visible pair, and with 128 rows 64 of them for a byte that is
// read. The items of the pool are (batch, key head, 128 rows); each goes through the blocks of keys that its rows see and
// keeps one running result per row, so memory beside the operands is a fixed amount per thread, whatever the lengths: no
// matrix of queries by keys exists, nor a mask, where causality and the window say what is seen.
//
// 128 rows share a transposed tile of keys, which then costs 2 % of what is computed with it; their queries, scores and
// sums, 330 KB with d = 128, live in L2, and the tile and one panel of 32 rows in L1. Tiles that no row of a panel sees
// are skipped: along the diagonal of a causal mask, half a tile is computed in vain.
#include "../pool.h"
#include "attention_block.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {
namespace {

constexpr size_t most_rows = attention_prefill_rows;

// A thread's buffers, one of a.slots in the scratch memory, which begins with a flag for each. The pool does not say
// which thread runs an item, so an item takes whichever slot is free; more threads than slots would wait their turn.
class Slot {
  public:
    Slot(float* scratch, const AttentionShape& a) : taken_(flags(scratch)) {
        for (index_ = 0; __atomic_test_and_set(taken_ + index_, __ATOMIC_ACQUIRE);) index_ = (index_ + 1) % a.slots;
        const size_t width = padded(a.size);
        float* p = scratch + flags_size(a.slots) + index_ * attention_slot(a.size);
        auto take = [&p](size_t floats) { return (p += floats) - floats; };
        work.scores = take(most_rows * block);
        work.floats = take(tile_size(a.size));
        work.q = take(most_rows / panel * queries_size(a.size));
        work.factor = take(block);
        stats = take(2 * most_rows), block_stats = take(2 * most_rows);
        acc = take(most_rows * width), block_acc = take(most_rows * width);
    }
    ~Slot() { __atomic_clear(taken_ + index_, __ATOMIC_RELEASE); }
    Slot(const Slot&) = delete;
    Slot& operator=(const Slot&) = delete;

    // Before the region.
    static void free_all(float* scratch, const AttentionShape& a) {
        for (size_t i = 0; i < a.slots; ++i) flags(scratch)[i] = 0;
    }

    Work work;
    float *stats, *block_stats, *acc, *block_acc;

  private:
    static uint8_t* flags(float* scratch) { return reinterpret_cast<uint8_t*>(scratch); }
    static size_t flags_size(size_t slots) { return padded((slots + 3) / 4); }

    uint8_t* taken_;
    size_t index_;
};

// Rows [begin, end) of one key head, through all blocks that they see. Rows count query by query (row t·R + h is head h
// of query t), so an item may begin and end within a query's heads, and all panels but the last are full. The queries
// are transposed once, and stay; the keys come by.
template <typename Q, typename T>
void attend_rows(const Call<Q, T>& call, size_t batch, size_t head, size_t begin, size_t end) {
    const AttentionShape& a = call.a;
    const size_t first_query = begin / a.repeats, last_query = (end - 1) / a.repeats, width = padded(a.size);
    const Slot slot(call.scratch, a);
    take_queries(call, batch, head, begin, end, slot.work.q);
    for (size_t r = 0; r < end - begin; ++r) start(slot.stats + 2 * r, slot.acc + r * width, width);
    const size_t end_key = span_of(a, last_query).end;
    for (size_t first = span_of(a, first_query).first / block * block; first < end_key; first += block) {
        Sight sight;
        if (!look(a, call.visible, batch, first, first_query, last_query - first_query + 1, sight)) continue;
        Visit<T>::of(call, batch, head, first, sight, slot.work).run(begin, end, slot.block_stats, slot.block_acc);
        for (size_t r = 0; r < end - begin; ++r)
            merge(slot.stats + 2 * r, slot.acc + r * width, slot.block_stats + 2 * r, slot.block_acc + r * width,
                  width);
    }
    for (size_t r = begin; r < end; ++r) {
        const size_t t = r / a.repeats, query_head = head * a.repeats + r % a.repeats;
        Q* out = call.out + ((batch * a.queries + t) * a.heads * a.repeats + query_head) * a.size;
        finish(slot.stats + 2 * (r - begin), slot.acc + (r - begin) * width, a.size, out);
    }
}

// Fewer rows an item where there would be too few items for the threads: fewer then share a tile's transposition, which
// takes a tenth of the time with 32. No bit depends on it.
size_t rows_per_item(const AttentionShape& a) {
    size_t rows = most_rows;
    while (rows > panel && a.batch * a.heads * (a.queries * a.repeats / rows) < 4 * a.slots) rows /= 2;
    return rows;
}

// Within a head the last rows come first: under a causal mask they see most, and small items at the end leave no thread
// waiting for a large one.
template <typename Q, typename T>
void attend(const Call<Q, T>& call) {
    const AttentionShape& a = call.a;
    const size_t rows = a.queries * a.repeats, each = rows_per_item(a), blocks = (rows + each - 1) / each;
    Slot::free_all(call.scratch, a);
    parallel(a.batch * a.heads * blocks, 1, [&](size_t from, size_t to) {
        for (size_t item = from; item < to; ++item) {
            const size_t begin = (blocks - 1 - item % blocks) * each, end = begin + each < rows ? begin + each : rows;
            attend_rows(call, item / blocks / a.heads, item / blocks % a.heads, begin, end);
        }
    });
}

}  // namespace

void attention_prefill(const AttentionShape* shape, const void* q, Dtype q_dtype, const void* k, const void* v,
                       Dtype kv_dtype, const float* k_scale, const float* v_scale, const uint8_t* visible,
                       float* scratch, void* out) noexcept {
    const Untyped untyped{shape, q, q_dtype, k, v, kv_dtype, k_scale, v_scale, visible, scratch, out};
    untyped.call([](const auto& call) { attend(call); });
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
