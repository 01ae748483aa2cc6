// Attention of a few queries to many keys: softmax(q·kᵀ · d^-1/2) v, grouped-query, a block of 256 keys at a time.
//
// All rows (queries times the R query heads) of a key head visit a block together, so keys and values are read from
// memory once: 4·d bytes a key in bfloat16. The arithmetic is 2·d·rows fused multiply-adds a key; with 16 rows and
// d = 128 that is twice the time of the memory, so what counts is to keep the multipliers fed:
//   scores   32 keys are transposed into lanes; a step takes one channel of 2 x 16 keys and of 8 rows, 16 chains.
//   values   lanes are channels; a step takes one key, 4 rows and 64 channels, 16 chains.
// The items of the pool are (batch, key head, block); each leaves for every row the largest score m, the sum s of
// exp(score - m) and the weighted values. A second region puts a row's blocks together, in order.
//
// Order of additions, by which the bits are fixed: a score is the sum, in order, of chains of fma over 32 channels; s is
// sixteen chains (key mod 16) over a block, then sum(); a channel of the values is one chain of fma over a block's keys;
// blocks follow in order of keys. Blocks start at multiples of 256, whatever a query sees. A key that a query does not
// see has weight zero, and adding zero changes nothing: neither the length of the buffer nor what lies in its unseen
// slots shows.
#include "../kernels.h"
#include "../pool.h"
#include "../simd_rows.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {
namespace {

constexpr size_t block = 256, tile = 32;
constexpr size_t chain = 32;     // channels; one chain over 128 of them errs twice as much, which a softmax magnifies
constexpr size_t max_rows = 32;  // rows that visit a block together; more take turns, with the block in L2
constexpr size_t max_queries = attention_max_queries, max_size = attention_max_size;

// Registers: 16 chains of f32x16 fill half the file of AVX-512, 4 of them that of AVX2.
#if defined(__AVX512F__)
constexpr size_t score_rows = 8, score_vectors = 2, value_rows = 4, value_vectors = 4;
#else
constexpr size_t score_rows = 4, score_vectors = 1, value_rows = 4, value_vectors = 1;
#endif

constexpr float infinity = __builtin_inff();

size_t padded(size_t size) { return (size + lanes - 1) / lanes * lanes; }

// What the queries see of one block.
struct Sight {
    size_t keys;                      // of the block, 256 or fewer at the end
    float cap[max_queries][block];    // infinity where query t sees the key, else -infinity
    uint8_t seen[block];              // some query sees the key
    bool tile_seen[block / tile];     // some query sees a key of the tile
    bool tile_differs[block / tile];  // the queries differ about the tile
    size_t tiles;                     // up to the last one that is seen
};

// What one thread needs for one block, some 100 KB; with d = 128 and 16 rows it touches 40 of them, which is L1's.
struct Work {
    alignas(64) float scores[max_rows * block];       // [row][key]; then the weights
    alignas(64) float floats[tile * (max_size + 4)];  // keys [panel of 16][channel][key]; then values [key][channel]
    alignas(64) float q[(max_size + 4) * max_rows];   // [channel][row]
    alignas(64) float factor[block];                  // from dot product to score: d^-1/2, or the key's own scale
};

// s[key] = 1 where query t sees that key of the block, else 0.
void look(const AttentionShape& a, const uint8_t* visible, size_t batch, size_t t, size_t first_key, size_t keys,
          uint8_t (&s)[block]) {
    for (size_t key = 0; key < block; ++key) s[key] = visible == nullptr && key < keys;
    if (visible != nullptr) {
        const size_t stride = a.visible_stride[2];
        const uint8_t* from = visible + batch * a.visible_stride[0] + t * a.visible_stride[1] + first_key * stride;
        for (size_t key = 0; key < keys; ++key) s[key] = from[key * stride];
    }
    if (a.causal)
        for (size_t key = 0; key < keys; ++key) s[key] &= first_key + key <= t;
}

// Whether the mask hides the whole block from all queries: what a long buffer and a sliding window are full of.
bool hidden(const AttentionShape& a, const uint8_t* visible, size_t batch, size_t first_key, size_t keys) {
    if (visible == nullptr) return false;
    const size_t stride = a.visible_stride[2];
    for (size_t t = 0; t < a.queries; ++t) {
        const uint8_t* from = visible + batch * a.visible_stride[0] + t * a.visible_stride[1] + first_key * stride;
        uint8_t any = 0;
        if (stride == 1) {
            for (size_t key = 0; key < keys; ++key) any |= from[key];
        } else {
            for (size_t key = 0; key < keys; ++key) any |= from[key * stride];
        }
        if (any) return false;
    }
    return true;
}

// Returns whether any query sees anything of the block.
bool look(const AttentionShape& a, const uint8_t* visible, size_t batch, size_t first_key, Sight& sight) {
    sight.keys = a.keys - first_key < block ? a.keys - first_key : block;
    if (hidden(a, visible, batch, first_key, sight.keys)) return false;
    uint8_t first[block], s[block], any = 0;
    look(a, visible, batch, 0, first_key, sight.keys, first);
    for (size_t key = 0; key < block; ++key) sight.seen[key] = 0;
    for (size_t i = 0; i < block / tile; ++i) sight.tile_seen[i] = sight.tile_differs[i] = false;
    for (size_t t = 0; t < a.queries; ++t) {
        look(a, visible, batch, t, first_key, sight.keys, s);
        for (size_t key = 0; key < block; ++key) {
            any |= s[key];
            sight.seen[key] |= s[key];
            sight.cap[t][key] = s[key] ? infinity : -infinity;
        }
        for (size_t key = 0; key < block; ++key) sight.tile_differs[key / tile] |= s[key] != first[key];
    }
    for (size_t key = 0; key < block; ++key) sight.tile_seen[key / tile] |= sight.seen[key] != 0;
    for (sight.tiles = block / tile; sight.tiles > 0 && !sight.tile_seen[sight.tiles - 1];) --sight.tiles;
    return any != 0;
}

// Memory that is needed next: every step of arithmetic asks for one line of it. A tile is too short for the hardware to
// notice where it continues, and too much to be asked for at once.
struct Ahead {
    const char *next, *end;

    template <typename T>
    static Ahead of(const T* first, size_t rows, size_t stride) {
        const char* p = reinterpret_cast<const char*>(first);
        return {p, p + rows * stride * sizeof(T)};
    }
    void step() {
        if (next >= end) return;
        __builtin_prefetch(next);
        next += 64;
    }
};

// scores[r][16 w + lane] = the dot product of row r and that key, for `score_vectors` panels of 16 keys.
//
// A step has one channel: 2 loads of keys, 8 broadcasts of queries (loads too, from one line), 16 multiply-adds. The
// multipliers take 8 cycles for that, and their latency is 4: there are enough chains.
template <size_t rows>
void dot(const float* q, const float* keys, size_t size, size_t panel, float* scores, Ahead& memory) {
    Ahead ahead = memory;
    for (size_t c = 0; c < size;) {
        f32x16 acc[rows][score_vectors];
        for (size_t r = 0; r < rows; ++r)
            for (size_t w = 0; w < score_vectors; ++w) acc[r][w] = fill(0.0f);
        const bool first = c == 0;
        for (const size_t end = c + chain < size ? c + chain : size; c < end; ++c, q += max_rows, keys += lanes) {
            f32x16 k[score_vectors];
            for (size_t w = 0; w < score_vectors; ++w) k[w] = load(keys + w * panel);
            ahead.step();
            for (size_t r = 0; r < rows; ++r) {
                const f32x16 channel = fill(q[r]);
                for (size_t w = 0; w < score_vectors; ++w) acc[r][w] = fma(channel, k[w], acc[r][w]);
            }
        }
        for (size_t r = 0; r < rows; ++r) {
            for (size_t w = 0; w < score_vectors; ++w) {
                float* score = scores + r * block + w * lanes;
                store(score, first ? acc[r][w] : add(load(score), acc[r][w]));
            }
        }
    }
    memory = ahead;
}

// Scores of a tile of 32 keys for all rows; the transposition costs a fifth of what 16 rows then compute with it. Keys
// behind the last one are copies of it: nobody sees them.
template <typename T>
void score_tile(const T* k, size_t stride, size_t keys, size_t rows, size_t size, Work& work, float* scores,
                Ahead ahead) {
    const size_t panel = lanes * (max_size + 4);
    for (size_t w = 0; w < tile / lanes; ++w) {
        const T* row[lanes];
        for (size_t i = 0; i < lanes; ++i) {
            const size_t key = w * lanes + i;
            row[i] = k + (key < keys ? key : keys - 1) * stride;
        }
        transpose_rows(row, size, work.floats + w * panel, lanes);
    }
    for (size_t w = 0; w < tile / lanes; w += score_vectors) {
        const float* panels = work.floats + w * panel;
        float* to = scores + w * lanes;
        size_t r = 0;
        for (; r + score_rows <= rows; r += score_rows)
            dot<score_rows>(work.q + r, panels, size, panel, to + r * block, ahead);
        if (score_rows > 4 && r + 4 <= rows) dot<4>(work.q + r, panels, size, panel, to + r * block, ahead), r += 4;
        for (; r < rows; ++r) dot<1>(work.q + r, panels, size, panel, to + r * block, ahead);
    }
}

// Dot products of one row to weights exp(score - m), zero where unseen; score = dot product times factor, rounded only
// once m is taken off: a score of 100 has no digits beyond 1e-5, its distance to the largest has. By way of the cap a NaN
// turns into infinity where the key is seen (then m is infinite, and infinity - infinity NaN again, in `combine`) and
// into -infinity where it is not, as any score does. The keys beyond `keys` would add zeros. A row without a finite score
// leaves m = -infinity, by which `combine` skips the block.
void weigh(float* scores, const float* factor, const float* cap, size_t keys, float* stats) {
    f32x16 largest = fill(-infinity), sums = fill(0.0f);
    for (size_t i = 0; i < keys; i += lanes) {
        const f32x16 s = min(mul(load(scores + i), load(factor + i)), load(cap + i));
        largest = max(s, largest);
    }
    float each[lanes], m = -infinity;
    store(each, largest);
    for (size_t i = 0; i < lanes; ++i) m = each[i] > m ? each[i] : m;
    for (size_t i = 0; i < keys; i += lanes) {
        const f32x16 x = min(fma(load(scores + i), load(factor + i), fill(-m)), load(cap + i));
        const f32x16 p = exp_or_zero(min(x, fill(1.0f)));  // x may be above zero by m's own rounding
        sums = add(sums, p);
        store(scores + i, p);
    }
    stats[0] = m;
    stats[1] = sum(sums);
}

// acc[r][channel] += weights[r][key] · values[key][channel] over a tile of keys, for 16 · `width` channels.
//
// A step has one key: 4 loads of values, 4 broadcasts of weights, 16 multiply-adds. The sums live in registers for a
// tile and in L1 between tiles.
template <size_t rows, size_t width>
void add_values(const float* weights, const float* values, size_t stride, float* acc, Ahead& memory) {
    Ahead ahead = memory;
    f32x16 sums[rows][width];
    for (size_t r = 0; r < rows; ++r)
        for (size_t w = 0; w < width; ++w) sums[r][w] = load(acc + r * stride + w * lanes);
    for (size_t key = 0; key < tile; ++key, values += stride) {
        f32x16 v[width];
        for (size_t w = 0; w < width; ++w) v[w] = load(values + w * lanes);
        ahead.step();
        for (size_t r = 0; r < rows; ++r) {
            const f32x16 p = fill(weights[r * block + key]);
            for (size_t w = 0; w < width; ++w) sums[r][w] = fma(p, v[w], sums[r][w]);
        }
    }
    for (size_t r = 0; r < rows; ++r)
        for (size_t w = 0; w < width; ++w) store(acc + r * stride + w * lanes, sums[r][w]);
    memory = ahead;
}

// All channels, padding included: values are zero there.
template <size_t rows>
void add_value_rows(const float* weights, const float* values, size_t stride, float* acc, Ahead& ahead) {
    size_t c = 0;
    for (; c + value_vectors * lanes <= stride; c += value_vectors * lanes)
        add_values<rows, value_vectors>(weights, values + c, stride, acc + c, ahead);
    for (; c < stride; c += lanes) add_values<rows, 1>(weights, values + c, stride, acc + c, ahead);
}

void add_tile(const float* weights, const float* values, size_t rows, size_t stride, float* acc, Ahead& ahead) {
    size_t r = 0;
    for (; r + value_rows <= rows; r += value_rows)
        add_value_rows<value_rows>(weights + r * block, values, stride, acc + r * stride, ahead);
    for (; r < rows; ++r) add_value_rows<1>(weights + r * block, values, stride, acc + r * stride, ahead);
}

// Values of a tile as floats [key][channel], times their scales; zero where `wanted` is not, so that what lies in an
// unseen slot, NaN included, meets no weight.
template <typename T, typename Wanted>
void widen_tile(const T* v, size_t stride, const float* scale, size_t size, const Wanted& wanted, float* out) {
    const size_t full = size / lanes * lanes, width = padded(size);
    for (size_t key = 0; key < tile; ++key, out += width) {
        if (!wanted(key)) {
            for (size_t c = 0; c < width; c += lanes) store(out + c, fill(0.0f));
            continue;
        }
        const T* row = v + key * stride;
        auto scaled = [&](f32x16 x) { return scale == nullptr ? x : mul(x, fill(scale[key])); };
        for (size_t c = 0; c < full; c += lanes) store(out + c, scaled(load(row + c)));
        if (full < size) store(out + full, scaled(load(row + full, size - full)));
    }
}

// One block of one key head: everything above for rows [begin, end) of its rows (query major: row = t·R + head).
template <typename T>
struct Visit {
    const AttentionShape& a;
    const T *k, *v;                  // the block's first key and value
    const float *k_scale, *v_scale;  // theirs, or null
    const Sight& sight;
    Work& work;

    void run(size_t begin, size_t end, float* stats, float* acc) const {
        const size_t rows = end - begin;
        score(rows);
        for (size_t r = 0; r < rows; ++r) {
            const float* cap = sight.cap[(begin + r) / a.repeats];
            weigh(work.scores + r * block, work.factor, cap, sight.tiles * tile, stats + 2 * r);
        }
        for (size_t c = 0; c < rows * padded(a.size); c += lanes) store(acc + c, fill(0.0f));
        for (size_t i = 0; i < sight.tiles; ++i)
            if (sight.tile_seen[i]) add_values_of_tile(i * tile, begin, end, acc);
    }

    void score(size_t rows) const {
        for (size_t i = 0; i < sight.tiles; ++i) {
            float* scores = work.scores + i * tile;
            const size_t first = i * tile;
            if (sight.tile_seen[i]) {
                const size_t stride = a.k_stride[2], keys = in_tile(first), next = first + tile;
                const Ahead ahead = next < sight.keys ? Ahead::of(k + next * stride, in_tile(next), stride)
                                                      : Ahead::of(v, in_tile(0), a.v_stride[2]);
                score_tile(k + first * stride, stride, keys, rows, a.size, work, scores, ahead);
            } else {
                for (size_t r = 0; r < rows; ++r)
                    for (size_t w = 0; w < tile; w += lanes) store(scores + r * block + w, fill(0.0f));
            }
        }
    }

    // Keys of the tile that begins with key `first`.
    size_t in_tile(size_t first) const { return sight.keys - first < tile ? sight.keys - first : tile; }

    // Where all queries see the same keys, as nearly everywhere, their rows share the tile's values. Where they differ
    // (this pass's own tokens, the edge of a window) each query gets its own, without those that it does not see.
    void add_values_of_tile(size_t first, size_t begin, size_t end, float* acc) const {
        const size_t width = padded(a.size), stride = a.v_stride[2], next = first + tile;
        const T* from = v + first * stride;
        const float* scale = v_scale == nullptr ? nullptr : v_scale + first;
        Ahead ahead = {nullptr, nullptr};
        if (next < sight.keys) ahead = Ahead::of(v + next * stride, in_tile(next), stride);
        if (!sight.tile_differs[first / tile]) {
            auto wanted = [&](size_t key) { return sight.seen[first + key] != 0; };
            widen_tile(from, stride, scale, a.size, wanted, work.floats);
            return add_tile(work.scores + first, work.floats, end - begin, width, acc, ahead);
        }
        for (size_t row = begin; row < end;) {
            const size_t t = row / a.repeats, next = (t + 1) * a.repeats < end ? (t + 1) * a.repeats : end;
            auto wanted = [&](size_t key) { return sight.cap[t][first + key] > 0.0f; };
            widen_tile(from, stride, scale, a.size, wanted, work.floats);
            add_tile(work.scores + (row - begin) * block + first, work.floats, next - row, width,
                     acc + (row - begin) * width, ahead);
            row = next;
        }
    }
};

// Rows [begin, end) of the queries times `by`, [channel][row]; rows behind the last are copies of it.
template <typename Q>
void take_queries(const AttentionShape& a, const Q* q, size_t begin, size_t end, float by, Work& work) {
    for (size_t g = 0; g < end - begin; g += lanes) {
        const Q* row[lanes];
        for (size_t i = 0; i < lanes; ++i) {
            const size_t r = begin + g + i < end ? begin + g + i : end - 1;
            row[i] = q + (r / a.repeats * a.heads * a.repeats + r % a.repeats) * a.size;
        }
        float* to = work.q + g;
        transpose_rows(row, a.size, to, max_rows);
        for (size_t c = 0; c < a.size; ++c, to += max_rows) store(to, mul(load(to), fill(by)));
    }
}

struct Partial {
    float *stats, *acc;
};

// Where item (batch, key head, block) leaves its rows: all (m, s) pairs first, then all weighted values.
Partial partial(const AttentionShape& a, float* scratch, size_t items, size_t item) {
    const size_t rows = a.queries * a.repeats;
    return {scratch + 2 * item * rows, scratch + padded(2 * items * rows) + item * rows * padded(a.size)};
}

template <typename Q, typename T>
void attend_block(const AttentionShape& a, const Q* q, const T* k, const T* v, const float* k_scale,
                  const float* v_scale, const uint8_t* visible, float* scratch, size_t items, size_t item) {
    const size_t blocks = (a.keys + block - 1) / block, rows = a.queries * a.repeats;
    const size_t first = item % blocks * block, head = item / blocks % a.heads, batch = item / blocks / a.heads;
    const Partial to = partial(a, scratch, items, item);
    Sight sight;
    if (!look(a, visible, batch, first, sight)) {
        for (size_t r = 0; r < rows; ++r) to.stats[2 * r] = -infinity;
        return;
    }
    Work work;
    if (k_scale != nullptr) k_scale += batch * a.k_scale_stride[0] + head * a.k_scale_stride[1] + first;
    if (v_scale != nullptr) v_scale += batch * a.v_scale_stride[0] + head * a.v_scale_stride[1] + first;
    const float scale = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(a.size)));
    for (size_t key = 0; key < block; ++key)
        work.factor[key] = k_scale == nullptr ? scale : key < sight.keys ? k_scale[key] : 0.0f;
    const Visit<T> visit{a,
                         k + batch * a.k_stride[0] + head * a.k_stride[1] + first * a.k_stride[2],
                         v + batch * a.v_stride[0] + head * a.v_stride[1] + first * a.v_stride[2],
                         k_scale,
                         v_scale,
                         sight,
                         work};
    const Q* own = q + (batch * a.queries * a.heads + head) * a.repeats * a.size;
    for (size_t begin = 0; begin < rows; begin += max_rows) {
        const size_t end = begin + max_rows < rows ? begin + max_rows : rows;
        take_queries(a, own, begin, end, k_scale == nullptr ? 1.0f : scale, work);
        visit.run(begin, end, to.stats + 2 * begin, to.acc + begin * padded(a.size));
    }
}

// Output row `index` of [batch][query][query head]: its blocks in order, each times exp(m - the largest m). Both sums
// start at +0, which also makes a block's -0 (a subnormal that was flushed) the zero that it would be without.
template <typename Q>
void combine(const AttentionShape& a, float* scratch, size_t items, size_t index, Q* out) {
    const size_t blocks = (a.keys + block - 1) / block, query_heads = a.heads * a.repeats;
    const size_t head = index % query_heads, t = index / query_heads % a.queries;
    const size_t batch = index / query_heads / a.queries;
    const size_t row = t * a.repeats + head % a.repeats, first = (batch * a.heads + head / a.repeats) * blocks;
    const size_t width = padded(a.size);
    float m = -infinity;
    for (size_t i = 0; i < blocks; ++i) {
        const float own = partial(a, scratch, items, first + i).stats[2 * row];
        m = own > m ? own : m;
    }
    f32x16 s = fill(0.0f), acc[max_size / lanes];
    for (size_t c = 0; c < width / lanes; ++c) acc[c] = fill(0.0f);
    for (size_t i = 0; i < blocks; ++i) {
        const Partial from = partial(a, scratch, items, first + i);
        if (from.stats[2 * row] == -infinity) continue;
        const f32x16 by = exp_or_zero(fill(from.stats[2 * row] - m));
        s = fma(by, fill(from.stats[2 * row + 1]), s);
        for (size_t c = 0; c < width / lanes; ++c) acc[c] = fma(by, load(from.acc + row * width + c * lanes), acc[c]);
    }
    out += index * a.size;
    for (size_t c = 0; c < a.size; c += lanes) {
        const f32x16 y = div(acc[c / lanes], s);
        if (a.size - c >= lanes) store(out + c, y);
        else store(out + c, y, a.size - c);
    }
}

template <typename Q, typename T>
void attend(const AttentionShape& a, const void* q, const void* k, const void* v, const float* k_scale,
            const float* v_scale, const uint8_t* visible, float* scratch, void* out) {
    const size_t items = a.batch * a.heads * ((a.keys + block - 1) / block);
    parallel(items, 1, [&](size_t begin, size_t end) {
        for (size_t item = begin; item < end; ++item)
            attend_block(a, static_cast<const Q*>(q), static_cast<const T*>(k), static_cast<const T*>(v), k_scale,
                         v_scale, visible, scratch, items, item);
    });
    parallel(a.batch * a.queries * a.heads * a.repeats, 4, [&](size_t begin, size_t end) {
        for (size_t index = begin; index < end; ++index) combine(a, scratch, items, index, static_cast<Q*>(out));
    });
}

template <typename Q>
void with_keys(const AttentionShape& a, const void* q, const void* k, const void* v, Dtype kv_dtype,
               const float* k_scale, const float* v_scale, const uint8_t* visible, float* scratch, void* out) {
    if (k_scale != nullptr) attend<Q, int8_t>(a, q, k, v, k_scale, v_scale, visible, scratch, out);
    else if (kv_dtype == Dtype::float32) attend<Q, float>(a, q, k, v, k_scale, v_scale, visible, scratch, out);
    else attend<Q, bf16>(a, q, k, v, k_scale, v_scale, visible, scratch, out);
}

}  // namespace

void attention(const AttentionShape* shape, const void* q, Dtype q_dtype, const void* k, const void* v, Dtype kv_dtype,
               const float* k_scale, const float* v_scale, const uint8_t* visible, float* scratch, void* out) noexcept {
    if (q_dtype == Dtype::float32)
        with_keys<float>(*shape, q, k, v, kv_dtype, k_scale, v_scale, visible, scratch, out);
    else
        with_keys<bf16>(*shape, q, k, v, kv_dtype, k_scale, v_scale, visible, scratch, out);
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
