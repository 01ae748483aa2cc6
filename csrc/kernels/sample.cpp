// One token from a row of logits: greedy, or a draw after top_k, top_p and min_p.
//
// No sorting: what top_k and top_p ask for is a threshold. crossing() finds it by cutting the range of values in four,
// over and over, each time looking only at the values that are still in doubt; 131072 logits need one or two passes
// over the row and then next to nothing. The row and its weights (0.5 MB each) stay in L2, so a pass costs some
// microseconds; the exponentials of an untruncated row are the dearest part. Single-threaded: waking a thread would
// gain little.
//
// Weights are float32, sums of them double over blocks of 1024 in a fixed order. Ties at a threshold go to the lower
// ids.
#include "../kernels.h"
#include "../simd.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {
namespace {

constexpr size_t block = 64 * lanes;
#if defined(NEMOTRON_H_PLANT_OVERRUN)
constexpr size_t planted = 1;  // one logit too many, for `make sanitize` to find
#else
constexpr size_t planted = 0;
#endif

constexpr float least_scaled = -64.0f;  // a token of e^-64: no draw with 53 bits can reach it

// The last n < 16 values, then lanes that no finite bound lets in.
f32x16 tail(const float* p, size_t n) {
    float buffer[lanes];
    for (size_t i = 0; i < lanes; ++i) buffer[i] = i < n ? p[i] : -__builtin_inff();
    return load(buffer);
}

inline f32x16 vector_at(const float* x, size_t i, size_t n) {
    return n - i >= lanes ? load(x + i) : tail(x + i, n - i);
}

// Floats in order, as integers: the next float up is the next integer. Both zeros have the key 0.
int32_t key_of(float a) {
    a += 0.0f;
    int32_t bits;
    __builtin_memcpy(&bits, &a, sizeof bits);
    return bits < 0 ? bits ^ 0x7fffffff : bits;
}
float value_of(int64_t key) {
    int32_t bits = static_cast<int32_t>(key);
    if (bits < 0) bits ^= 0x7fffffff;
    float a;
    __builtin_memcpy(&a, &bits, sizeof a);
    return a;
}

struct Extremes {
    float least, greatest;
    bool finite;
};

Extremes extremes(const float* x, size_t n) {
    f32x16 high = fill(x[0]), low = fill(x[0]), odd = fill(0.0f);
    size_t i = 0;
    for (; i + lanes <= n; i += lanes) {
        const f32x16 v = load(x + i);
        high = max(v, high), low = min(v, low);
        odd = add(odd, sub(v, v));  // 0 for a number, NaN for infinity and NaN
    }
    float highs[lanes], lows[lanes];
    store(highs, high), store(lows, low);
    Extremes e{lows[0], highs[0], sum(odd) == 0.0f};
    for (size_t k = 0; k < lanes; ++k) {
        e.greatest = highs[k] > e.greatest ? highs[k] : e.greatest;
        e.least = lows[k] < e.least ? lows[k] : e.least;
    }
    for (; i < n + planted; ++i) {
        e.greatest = x[i] > e.greatest ? x[i] : e.greatest;
        e.least = x[i] < e.least ? x[i] : e.least;
        e.finite = e.finite && x[i] - x[i] == 0.0f;
    }
    return e;
}

size_t first_at_least(const float* x, size_t n, float bound) {
    for (size_t i = 0; i < n; i += lanes) {
        const uint32_t mask = mask_at_least(vector_at(x, i, n), fill(bound));
        if (mask != 0) return i + static_cast<size_t>(__builtin_ctz(mask));
    }
    return 0;
}

// What a value counts: top_k counts values, top_p adds weights.
enum class Measure { count, value };

constexpr int pivots = 3;

// sums[j] = measure of the values that reach bound[j].
template <Measure measure>
void measure_from(const float* x, size_t n, const float* bound, double* sums) {
    for (int j = 0; j < pivots; ++j) sums[j] = 0.0;
    for (size_t begin = 0; begin < n; begin += block) {
        const size_t end = n - begin < block ? n : begin + block;
        f32x16 acc[pivots] = {fill(0.0f), fill(0.0f), fill(0.0f)};
        for (size_t i = begin; i < end; i += lanes) {
            const f32x16 v = vector_at(x, i, n);
            const f32x16 counted = measure == Measure::count ? fill(1.0f) : v;
            for (int j = 0; j < pivots; ++j) acc[j] = add(acc[j], where(mask_at_least(v, fill(bound[j])), counted));
        }
        for (int j = 0; j < pivots; ++j) sums[j] += static_cast<double>(sum(acc[j]));
    }
}

// Values in [low, high) side by side in `to`, which may be x and has 16 places more; returns their number.
size_t gather(const float* x, size_t n, float low, float high, float* to) {
    size_t found = 0;
    for (size_t i = 0; i < n; i += lanes) {
        const f32x16 v = vector_at(x, i, n);
        const uint32_t mask = mask_at_least(v, fill(low)) & ~mask_at_least(v, fill(high));
        if (mask == 0) continue;
        compress(to + found, v, mask);
        found += static_cast<size_t>(__builtin_popcount(mask));
    }
    return found;
}

// The value at which the measure of the values, added from the greatest down, reaches `goal`; and the measure of all
// that are greater, which does not reach it.
struct Crossing {
    float value;
    double above;
};

// All values that matter lie in [least, greatest]. Pivots lie at equal distances in value or, every other time, in key:
// the first is quick for what logits look like, the second ends within 16 rounds whatever they look like.
template <Measure measure>
Crossing crossing(const float* x, size_t n, float least, float greatest, double goal, float* scratch) {
    int64_t low = key_of(least), high = static_cast<int64_t>(key_of(greatest)) + 1;
    double above = 0.0;  // measure of all values with keys >= high
    for (bool by_key = false; high - low > 1; by_key = !by_key) {
        int64_t key[pivots];
        float bound[pivots];
        for (int j = 0; j < pivots; ++j) {
            const double from = static_cast<double>(value_of(low)), to = static_cast<double>(value_of(high - 1));
            const int64_t middle = by_key ? low + (high - low) * (j + 1) / 4
                                          : key_of(static_cast<float>(from + (to - from) * (j + 1) / 4));
            key[j] = middle <= low ? low + 1 : middle >= high ? high - 1 : middle;
            bound[j] = value_of(key[j]);
        }
        double sums[pivots];
        measure_from<measure>(x, n, bound, sums);
        const double base = above;
        for (int j = pivots - 1; j >= 0; --j) {
            if (base + sums[j] >= goal) {
                low = key[j];
                break;
            }
            high = key[j], above = base + sums[j];
        }
        n = gather(x, n, value_of(low), value_of(high), scratch);
        x = scratch;
    }
    return {value_of(low), above};
}

// Which tokens stay: before `split` those that reach `low`, from there on those that reach `high`.
struct Cut {
    float low, high;
    size_t split;
};

// The cut at a crossing. Tokens of exactly its value stay, by ascending id, until the goal is reached.
template <Measure measure>
Cut cut_at(const float* x, size_t n, Crossing at, double goal) {
    const float next = value_of(static_cast<int64_t>(key_of(at.value)) + 1);
    const double each = measure == Measure::count ? 1.0 : static_cast<double>(at.value);
    for (size_t i = 0; i < n; i += lanes) {
        const f32x16 v = vector_at(x, i, n);
        uint32_t ties = mask_at_least(v, fill(at.value)) & ~mask_at_least(v, fill(next));
        for (; ties != 0; ties &= ties - 1) {
            if (at.above >= goal) return {at.value, next, i + static_cast<size_t>(__builtin_ctz(ties))};
            at.above += each;
        }
    }
    return {at.value, next, n};
}

// w = exp((x - best) · inverse temperature) for tokens [begin, end) that reach `bound`, else 0.
void weigh(const float* x, size_t begin, size_t end, float bound, float best, float inverse, float* w) {
    for (size_t i = begin; i < end; i += lanes) {
        const f32x16 v = vector_at(x, i, end);
        const f32x16 scaled = mul(sub(v, fill(best)), fill(inverse));
        const uint32_t mask = mask_at_least(v, fill(bound)) & mask_at_least(scaled, fill(least_scaled));
        const f32x16 weight = mask != 0 ? where(mask, exp(scaled)) : fill(0.0f);
        if (end - i >= lanes) store(w + i, weight);
        else store(w + i, weight, end - i);
    }
}

void drop_below(float* w, size_t begin, size_t end, float bound) {
    for (size_t i = begin; i < end; i += lanes) {
        const f32x16 v = vector_at(w, i, end);
        const f32x16 kept = where(mask_at_least(v, fill(bound)), v);
        if (end - i >= lanes) store(w + i, kept);
        else store(w + i, kept, end - i);
    }
}

double block_sum(const float* w, size_t n) {
    f32x16 acc = fill(0.0f);
    size_t i = 0;
    for (; i + lanes <= n; i += lanes) acc = add(acc, load(w + i));
    if (i < n) acc = add(acc, load(w + i, n - i));
    return static_cast<double>(sum(acc));
}

double total_of(const float* w, size_t n) {
    double total = 0.0;
    for (size_t i = 0; i < n; i += block) total += block_sum(w + i, n - i < block ? n - i : block);
    return total;
}

// The first token at which the running sum of weights, by ascending id, exceeds `goal` < total_of(w, n).
size_t draw(const float* w, size_t n, double goal) {
    double before = 0.0;
    size_t begin = 0;
    for (; n - begin > block; begin += block) {
        const double after = before + block_sum(w + begin, block);
        if (after > goal) break;
        before = after;
    }
    const size_t end = n - begin < block ? n : begin + block;
    size_t last = begin;
    for (size_t i = begin; i < end; ++i) {
        before += static_cast<double>(w[i]);
        if (before > goal) return i;
        if (w[i] > 0.0f) last = i;
    }
    return last;  // added one by one, the block may end a rounding error short of what it is by vectors
}

}  // namespace

int64_t sample(const float* logits, size_t V, float temperature, size_t top_k, double top_p, float min_p, double u,
               float* scratch) noexcept {
    const Extremes e = extremes(logits, V);
    if (!e.finite) return -1;
    if (temperature == 0.0f) return static_cast<int64_t>(first_at_least(logits, V, e.greatest));

    float *w = scratch, *spare = scratch + V + lanes;
    Cut cut{e.least, e.least, V};
    if (top_k > 0 && top_k < V) {
        const double goal = static_cast<double>(top_k);
        const Crossing at = crossing<Measure::count>(logits, V, e.least, e.greatest, goal, spare);
        cut = cut_at<Measure::count>(logits, V, at, goal);
    }
    const float inverse = 1.0f / temperature;
    weigh(logits, 0, cut.split, cut.low, e.greatest, inverse, w);
    weigh(logits, cut.split, V, cut.high, e.greatest, inverse, w);

    Cut kept{min_p, min_p, V};
    if (top_p < 1.0) {
        const double total = total_of(w, V), goal = top_p * total;
        // Tokens below this weigh less than 1 - top_p together, so they lie beyond the crossing; half, for rounding.
        const double beyond = 0.5 * (1.0 - top_p) * total / static_cast<double>(V);
        const float least = beyond > 1e-28 ? static_cast<float>(beyond) : 1e-28f;
        const size_t n = gather(w, V, least, __builtin_inff(), spare);
        kept = cut_at<Measure::value>(w, V, crossing<Measure::value>(spare, n, least, 1.0f, goal, spare), goal);
        kept.low = kept.low > min_p ? kept.low : min_p;
        kept.high = kept.high > min_p ? kept.high : min_p;
    }
    if (top_p < 1.0 || min_p > 0.0f) {
        drop_below(w, 0, kept.split, kept.low);
        drop_below(w, kept.split, V, kept.high);
    }
    return static_cast<int64_t>(draw(w, V, u * total_of(w, V)));
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
