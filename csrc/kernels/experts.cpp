// Routed experts: every visit of a token to an expert is a row, the rows are sorted by expert, and each expert that has
// any is read once: up, relu², down. The sum over a token's experts comes last, in the order in which they are given. More
// than experts_piece tokens are taken in pieces, so that what lies between the regions has a bound.
//
// Four regions: x to int8; all chosen experts' up; relu² to int8; all chosen experts' down; then the sum. Within a region
// the items are (expert, panels), in that order, so that each thread reads long runs of memory.
#include "tile_rows.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {
namespace {

// Visits sorted by expert, in groups of one expert and at most so many rows as are multiplied together: those of the i-th
// group are order[begin[i] .. begin[i + 1]).
struct Visits {
    size_t groups = 0, longest = 0;
    size_t* order;   // [V] visits; the token of visit v is v / k
    size_t* token;   // [V] order[i] / k
    size_t* expert;  // [groups], at most V
    size_t* begin;   // [groups + 1]
};

bool all_legal(const int64_t* experts, size_t visits, size_t E) {
    for (size_t v = 0; v < visits; ++v)
        if (experts[v] < 0 || static_cast<size_t>(experts[v]) >= E) return false;
    return true;
}

void sort_visits(const int64_t* experts, size_t visits, size_t k, size_t E, size_t most, Visits& out, size_t* counts) {
    for (size_t e = 0; e < E; ++e) counts[e] = 0;
    for (size_t v = 0; v < visits; ++v) ++counts[experts[v]];
    size_t at = 0;
    for (size_t e = 0; e < E; ++e) {
        const size_t count = counts[e], parts = ceil_div(count, most);
        for (size_t part = 0; part < parts; ++part) {  // of nearly equal size, so that none has a few rows only
            out.expert[out.groups] = e;
            out.begin[out.groups++] = at + part * count / parts;
        }
        out.longest = count > out.longest ? count : out.longest;
        counts[e] = at;  // from here on: where the expert's next visit goes
        at += count;
    }
    out.begin[out.groups] = at;
    for (size_t v = 0; v < visits; ++v) {
        const size_t to = counts[experts[v]]++;
        out.order[to] = v;
        out.token[to] = v / k;
    }
}

// One matrix of every chosen expert, by the rows of x that visit it: use(i, expert, first output, 16 outputs), i counting
// visits in their order. rows: which of x belongs to each, or null: the i-th.
template <typename Use>
void visit_experts(const void* data, size_t bytes, const Weights& shape, const Visits& visits, const Rows& x,
                   const size_t* rows, const Use& use) {
    const size_t panels = shape.panels(), width = visits.longest > 1 ? tile_panels : 1;
    const size_t columns = ceil_div(panels, width);
    parallel(visits.groups * columns, ceil_div(panel_grain(shape), width), [&](size_t begin, size_t end) {
        for (size_t item = begin; item < end; ++item) {
            const size_t i = item / columns, panel = item % columns * width, first = visits.begin[i];
            Weights w = shape;
            w.data = static_cast<const char*>(data) + visits.expert[i] * bytes;
            const size_t here = panels - panel < width ? panels - panel : width;
            const Rows own = rows == nullptr ? x.from(first) : x;
            const size_t* at = rows == nullptr ? nullptr : rows + first;
            products_by_any(w, panel, here, own, at, visits.begin[i + 1] - first, [&](size_t p, size_t m, f32x16 y) {
                use(first + m, visits.expert[i], p * panel_rows, y);
            });
        }
    });
}

template <typename Out>
void sum_visits(const float* y, const float* weights, size_t M, size_t k, size_t L, Out* out) {
    const size_t vectors = ceil_div(L, lanes);
    parallel(M * vectors, ceil_div(8192, k), [&](size_t begin, size_t end) {
        for (size_t item = begin; item < end; ++item) {
            const size_t m = item / vectors, c = item % vectors * lanes, count = L - c;
            f32x16 acc = fill(0.0f);
            for (size_t j = 0; j < k; ++j)
                acc = fma(fill(weights[m * k + j]), load_up_to(y + (m * k + j) * L + c, count), acc);
            store_some(out + m * L + c, acc, count);
        }
    });
}

// All that stays the same from token to token.
struct Layer {
    size_t k, E;
    const char *up, *down;
    size_t up_bytes, down_bytes, L, F;
    Weights up_shape, down_shape;
    const float *up_bias, *down_bias;
    bool wide;
};

// M tokens, at most experts_piece.
void piece(const Layer& l, const void* x, Dtype x_dtype, size_t x_stride, size_t M, const int64_t* experts,
           const float* weights, void* out, Dtype out_dtype, void* scratch) {
    const size_t V = M * l.k, L = l.L, F = l.F;
    char* at = static_cast<char*>(scratch);
    auto take = [&](size_t bytes) {
        char* taken = at;
        at += padded(bytes);
        return static_cast<void*>(taken);
    };
    size_t* index = static_cast<size_t*>(take((4 * V + 1 + l.E) * sizeof(size_t)));
    Visits visits{0, 0, index, index + V, index + 2 * V, index + 3 * V};
    const bool narrow = keeps_bf16(l.up_shape.format, x_dtype, M);
    const Rows x_rows = place_rows(M, L, l.wide, at, narrow), h_rows = place_rows(V, F, l.wide, at);
    float* h = static_cast<float*>(take(V * F * sizeof(float)));
    char* apart = at;  // y is written last: until then its place serves for the rows apart
    float* y = static_cast<float*>(take(V * L * sizeof(float)));
    sort_visits(experts, V, l.k, l.E, rows_of_block(L > F ? x_rows : h_rows), visits, index + 4 * V + 1);

    prepare_rows(x, x_dtype, x_stride, M, L, x_rows);
    Rows visitors = x_rows;
    const size_t* token = visits.token;
    if (has_tiles && (narrow || visits.longest >= rows_for_tiles)) {
        visitors = place_rows(V, L, l.wide, apart, narrow);
        gather_rows(x_rows, token, V, visitors);
        token = nullptr;
    }
    visit_experts(l.up, l.up_bytes, l.up_shape, visits, visitors, token, [&](size_t i, size_t expert, size_t n, f32x16 u) {
        if (l.up_bias != nullptr) u = add(u, load_up_to(l.up_bias + expert * F + n, F - n));
        store_some(h + i * F + n, relu2(u), F - n);
    });
    prepare_rows(h, F, V, F, h_rows);
    visit_experts(l.down, l.down_bytes, l.down_shape, visits, h_rows, nullptr, [&](size_t i, size_t expert, size_t n, f32x16 u) {
        if (l.down_bias != nullptr) u = add(u, load_up_to(l.down_bias + expert * L + n, L - n));
        store_some(y + visits.order[i] * L + n, u, L - n);
    });
    if (out_dtype == Dtype::float32) sum_visits(y, weights, M, l.k, L, static_cast<float*>(out));
    else sum_visits(y, weights, M, l.k, L, static_cast<bf16*>(out));
}

constexpr size_t bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

}  // namespace

bool experts(const void* x, Dtype x_dtype, size_t x_stride, size_t M, size_t k, size_t E, const int64_t* experts,
             const float* weights, const void* up, size_t up_bytes, const void* down, size_t down_bytes, Format format,
             size_t group, ScaleType scale_type, Arithmetic arithmetic, size_t L, size_t F, const float* up_bias,
             const float* down_bias, void* out, Dtype out_dtype, void* scratch) noexcept {
    const FlushSubnormals flush;
    if (!all_legal(experts, M * k, E)) return false;
    const Layer layer{k, E, static_cast<const char*>(up), static_cast<const char*>(down), up_bytes, down_bytes, L, F,
                      {nullptr, format, L, F, L, group, scale_type}, {nullptr, format, F, L, F, group, scale_type},
                      up_bias, down_bias, takes_float(format, arithmetic)};
    about_to_read(up, 0);  // which of them the next token will choose, nobody knows
    for (size_t m = 0; m < M; m += experts_piece) {
        piece(layer, static_cast<const char*>(x) + m * x_stride * bytes_of(x_dtype), x_dtype, x_stride,
              M - m < experts_piece ? M - m : experts_piece, experts + m * k, weights + m * k,
              static_cast<char*>(out) + m * L * bytes_of(out_dtype), out_dtype, scratch);
    }
    return true;
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
