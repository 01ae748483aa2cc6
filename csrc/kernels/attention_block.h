// What rows of queries make of one block of 256 keys: m, the largest score; s, the sum of exp(score - m); and the
// values weighted by it. `merge` then puts a row's blocks together, in the order of keys, in any kernel alike.
//
// A softmax over all keys needs its largest score first. A block needs only its own: with m and s beside them, two
// blocks' results are brought to one scale afterwards, exp(score - m) = exp(score - m') · exp(m' - m), so scores are
// forgotten block by block.
//
// Blocks start at multiples of 256, whatever a query sees; a key that a query does not see has weight zero, and adding
// zero changes nothing. So neither the other queries nor the length of the buffer nor what lies in its unseen slots
// shows, and a query has one result whether it comes alone, behind a cache, or among thousands.
#pragma once

#include "attention_products.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {
namespace {

constexpr size_t max_queries = attention_prefill_rows;  // that look at a block together

// One call of the op, by the types of queries and keys.
template <typename Q, typename T>
struct Call {
    const AttentionShape& a;
    const Q* q;
    const T *k, *v;
    const float *k_scale, *v_scale;  // null where keys and values stand for themselves
    const uint8_t* visible;          // or null
    float* scratch;
    Q* out;

    float scale() const { return static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(a.size))); }
};

// The same before anybody looked at the dtypes: six instances of every kernel, of which `run` gets the right one.
struct Untyped {
    const AttentionShape* shape;
    const void* q;
    Dtype q_dtype;
    const void *k, *v;
    Dtype kv_dtype;
    const float *k_scale, *v_scale;
    const uint8_t* visible;
    float* scratch;
    void* out;

    template <typename Run>
    void call(const Run& run) const {
        if (q_dtype == Dtype::float32) call_with<float>(run);
        else call_with<bf16>(run);
    }
    template <typename Q, typename Run>
    void call_with(const Run& run) const {
        if (k_scale != nullptr) run(as<Q, int8_t>());
        else if (kv_dtype == Dtype::float32) run(as<Q, float>());
        else run(as<Q, bf16>());
    }
    template <typename Q, typename T>
    Call<Q, T> as() const {
        const T *keys = static_cast<const T*>(k), *values = static_cast<const T*>(v);
        return {*shape, static_cast<const Q*>(q), keys, values, k_scale, v_scale, visible, scratch, static_cast<Q*>(out)};
    }
};

// What queries see of one block, a word of 32 bits for every query and tile: bit i of word j is key 32 j + i.
// Causality, a window and a mask all end up as bits, a few instructions for 32 keys; what follows knows nothing else.
struct Sight {
    size_t first_query, keys;           // keys: of the block, 256 or fewer at the end
    uint32_t seen[max_queries][tiles];  // of query first_query + t
    uint32_t any[tiles];                // by some query
    bool differs[tiles];                // the queries differ about the tile
    size_t used;                        // tiles up to the last one that is seen
};

// Keys [first, end) of the call that query t may see by its place alone: the last `window` of 0 .. past + t.
struct Span {
    size_t first, end;
};
inline Span span_of(const AttentionShape& a, size_t t) {
    if (!a.causal) return {0, a.keys};
    const size_t end = a.past + t + 1;
    return {a.window != 0 && end > a.window ? end - a.window : 0, end < a.keys ? end : a.keys};
}

// The keys of `s` among the 32 that begin with key `first`.
inline uint32_t bits(const Span& s, size_t first) {
    auto below = [first](size_t key) {
        return key <= first ? 0u : key >= first + tile ? ~0u : (1u << (key - first)) - 1u;
    };
    return below(s.end) & ~below(s.first);
}

// The bits of n <= 32 bytes that are 0 or 1.
inline uint32_t bits(const uint8_t* bytes, size_t stride, size_t n) {
    uint32_t word = 0;
    if (stride != 1 || n != tile) {
        for (size_t i = 0; i < n; ++i) word |= static_cast<uint32_t>(bytes[i * stride] & 1) << i;
        return word;
    }
    for (size_t i = 0; i < tile; i += 8) {  // the product brings byte b's bit to bit 56 + b, and no two to one place
        uint64_t eight = 0;
        for (size_t b = 0; b < 8; ++b) eight |= static_cast<uint64_t>(bytes[i + b]) << (8 * b);
        word |= static_cast<uint32_t>(eight * 0x0102040810204080u >> 56) << i;
    }
    return word;
}

// Fills `sight` for queries [first_query, first_query + count) of a row of the batch; false if they see nothing here.
inline bool look(const AttentionShape& a, const uint8_t* visible, size_t batch, size_t first_key, size_t first_query,
                 size_t count, Sight& sight) {
    sight.first_query = first_query;
    sight.keys = a.keys - first_key < block ? a.keys - first_key : block;
    for (size_t j = 0; j < tiles; ++j) sight.any[j] = 0, sight.differs[j] = false;
    for (size_t t = 0; t < count; ++t) {
        const Span span = span_of(a, first_query + t);
        const size_t stride = a.visible_stride[2];
        const uint8_t* own = visible;
        if (own != nullptr)
            own += batch * a.visible_stride[0] + (first_query + t) * a.visible_stride[1] + first_key * stride;
        for (size_t j = 0; j < tiles; ++j) {
            uint32_t word = bits(span, first_key + j * tile);
            if (own != nullptr && word != 0) {
                const size_t left = sight.keys - j * tile;
                word &= bits(own + j * tile * stride, stride, left < tile ? left : tile);
            }
            sight.seen[t][j] = word;
            sight.any[j] |= word;
            sight.differs[j] |= word != sight.seen[0][j];
        }
    }
    for (sight.used = tiles; sight.used > 0 && sight.any[sight.used - 1] == 0;) --sight.used;
    return sight.used != 0;
}

// What one thread needs for rows and a block, in memory that the kernel brings: on the stack for the few rows of a
// decode step, in the caller's scratch for a prompt's.
struct Work {
    float* scores;  // [row][key of 256]; then the weights
    float* floats;  // a tile of keys, transposed; then of values
    float* q;       // [panel][channel][row of 32]
    float* factor;  // [key of 256], from dot product to score: d^-1/2, or the key's own scale
};
inline size_t tile_size(size_t size) { return 2 * keys_size(size); }  // floats; values need less

// Rows [begin, end) of a key head's queries times `by`, a panel after the other; rows behind the last are copies of it.
// Rows are counted query by query: row t·R + h is head h of query t.
template <typename Q, typename T>
inline void take_queries(const Call<Q, T>& call, size_t batch, size_t head, size_t begin, size_t end, float* out) {
    const AttentionShape& a = call.a;
    const Q* q = call.q + (batch * a.queries * a.heads + head) * a.repeats * a.size;
    const f32x16 by = fill(call.k_scale == nullptr ? 1.0f : call.scale());
    for (size_t g = 0; g < end - begin; g += lanes) {
        const Q* row[lanes];
        for (size_t i = 0; i < lanes; ++i) {
            const size_t r = begin + g + i < end ? begin + g + i : end - 1;
            row[i] = q + (r / a.repeats * a.heads * a.repeats + r % a.repeats) * a.size;
        }
        float* to = out + g / panel * queries_size(a.size) + g % panel;
        transpose_rows(row, a.size, to, panel);
        for (size_t c = 0; c < a.size; ++c, to += panel) store(to, mul(load(to), by));
    }
}

// One block of one key head, and the rows that visit it together. A tile of keys is transposed once for all of them,
// and a tile of values widened once; what is left per row is arithmetic. Rows are taken in panels of 32 that fit into
// L1, and a panel that sees nothing of a tile skips it: above the diagonal of a prompt, nothing is computed.
template <typename T>
struct Visit {
    const AttentionShape& a;
    const T *k, *v;                  // the block's first key and value
    const float *k_scale, *v_scale;  // theirs, or null
    const Sight& sight;
    const Work& work;

    template <typename Q>
    static Visit of(const Call<Q, T>& call, size_t batch, size_t head, size_t first, const Sight& sight,
                    const Work& work) {
        const AttentionShape& a = call.a;
        const float *k_scale = call.k_scale, *v_scale = call.v_scale;
        if (k_scale != nullptr) k_scale += batch * a.k_scale_stride[0] + head * a.k_scale_stride[1] + first;
        if (v_scale != nullptr) v_scale += batch * a.v_scale_stride[0] + head * a.v_scale_stride[1] + first;
        for (size_t key = 0; key < block; ++key)
            work.factor[key] = k_scale == nullptr ? call.scale() : key < sight.keys ? k_scale[key] : 0.0f;
        return {a,
                call.k + batch * a.k_stride[0] + head * a.k_stride[1] + first * a.k_stride[2],
                call.v + batch * a.v_stride[0] + head * a.v_stride[1] + first * a.v_stride[2],
                k_scale,
                v_scale,
                sight,
                work};
    }

    // Of rows [begin, end), whose queries lie in work.q: stats [row][m, s] and acc [row][channel]. First all scores,
    // then all weights, then all values: each phase streams through the tiles in order.
    void run(size_t begin, size_t end, float* stats, float* acc) const {
        for (size_t j = 0; j < sight.used; ++j)
            if (sight.any[j] != 0) score_tile(j, begin, end);
        for (size_t r = begin; r < end; ++r)
            weigh(work.scores + (r - begin) * block, work.factor, seen_by(r), sight.used, stats + 2 * (r - begin));
        for (size_t c = 0; c < (end - begin) * padded(a.size); c += lanes) store(acc + c, fill(0.0f));
        for (size_t j = 0; j < sight.used; ++j)
            if (sight.any[j] != 0) add_tile(j, begin, end, acc);
    }

  private:
    const uint32_t* seen_by(size_t row) const { return sight.seen[row / a.repeats - sight.first_query]; }

    // Whether any of rows [begin, end) sees a key of tile j.
    bool sees(size_t j, size_t begin, size_t end) const {
        uint32_t any = 0;
        for (size_t t = begin / a.repeats; t <= (end - 1) / a.repeats; ++t) any |= sight.seen[t - sight.first_query][j];
        return any != 0;
    }

    size_t in_tile(size_t j) const { return sight.keys - j * tile < tile ? sight.keys - j * tile : tile; }

    // fn(first row, row behind the last) for every panel of the rows that sees tile j.
    template <typename Fn>
    void panels(size_t j, size_t begin, size_t end, const Fn& fn) const {
        for (size_t first = begin; first < end; first += panel) {
            const size_t last = first + panel < end ? first + panel : end;
            if (sees(j, first, last)) fn(first, last);
        }
    }

    void score_tile(size_t j, size_t begin, size_t end) const {
        const size_t stride = a.k_stride[2];
        const bool more = (j + 1) * tile < sight.keys;
        Ahead ahead = more ? Ahead::of(k + (j + 1) * tile * stride, in_tile(j + 1), stride)
                           : Ahead::of(v, in_tile(0), a.v_stride[2]);
        transpose_keys(k + j * tile * stride, stride, in_tile(j), a.size, work.floats);
        panels(j, begin, end, [&](size_t first, size_t last) {
            score_panel(work.q + (first - begin) / panel * queries_size(a.size), work.floats, last - first, a.size,
                        work.scores + (first - begin) * block + j * tile, ahead);
        });
    }

    // All rows share the tile's values: a key that a row does not see has weight zero for it. Only where zero would not
    // hide a value, because that is no number, and not all queries see it, each query gets values of its own.
    void add_tile(size_t j, size_t begin, size_t end, float* acc) const {
        const size_t width = padded(a.size), stride = a.v_stride[2];
        const T* from = v + j * tile * stride;
        const float* scale = v_scale == nullptr ? nullptr : v_scale + j * tile;
        const bool more = (j + 1) * tile < sight.keys;
        Ahead ahead = more ? Ahead::of(from + tile * stride, in_tile(j + 1), stride) : Ahead{nullptr, nullptr};
        auto add = [&](size_t first, size_t last) {
            add_panel(work.scores + (first - begin) * block + j * tile, work.floats, last - first, width,
                      acc + (first - begin) * width, ahead);
        };
        const bool hidden = sight.differs[j]
                                ? widen_values<true>(from, stride, scale, a.size, sight.any[j], work.floats)
                                : widen_values<false>(from, stride, scale, a.size, sight.any[j], work.floats);
        if (hidden) return panels(j, begin, end, add);
        for (size_t first = begin; first < end;) {
            const size_t next = (first / a.repeats + 1) * a.repeats, last = next < end ? next : end;
            widen_values<false>(from, stride, scale, a.size, seen_by(first)[j], work.floats);
            add(first, last);
            first = last;
        }
    }
};

// A row's blocks so far: the largest score, the sum and the values by exp(score - m).
inline void start(float* stats, float* acc, size_t width) {
    stats[0] = -infinity, stats[1] = 0.0f;
    for (size_t c = 0; c < width; c += lanes) store(acc + c, fill(0.0f));
}

// Adds the next block. The side with the smaller m is multiplied by exp(the difference), the other by one, which is NaN
// where m is infinite. Zero is added to what was there before, so that a block's -0 (a subnormal that was flushed) is
// the zero that it would be without.
inline void merge(float* stats, float* acc, const float* block_stats, const float* block_acc, size_t width) {
    const float m = stats[0], own = block_stats[0];
    if (own == -infinity) return;
    const bool larger = own > m;
    stats[0] = larger ? own : m;
    const f32x16 e = exp_or_zero(fill(larger ? m - own : own - m)), one = fill(1.0f + (stats[0] - stats[0]));
    const f32x16 keep = larger ? e : one, by = larger ? one : e;
    float s[lanes];
    store(s, fma(by, fill(block_stats[1]), fma(keep, fill(stats[1]), fill(0.0f))));
    stats[1] = s[0];
    for (size_t c = 0; c < width; c += lanes)
        store(acc + c, fma(by, load(block_acc + c), fma(keep, load(acc + c), fill(0.0f))));
}

template <typename Q>
inline void finish(const float* stats, const float* acc, size_t size, Q* out) {
    for (size_t c = 0; c < size; c += lanes) store_some(out + c, div(load(acc + c), fill(stats[1])), size - c);
}

}  // namespace
}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
