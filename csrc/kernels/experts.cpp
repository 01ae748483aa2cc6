// Routed experts: every visit of a token to an expert is a row, the rows are sorted by expert, and each expert that has
// any is read once: up, relu², down. The sum over a token's experts comes last, in the order in which they are given.
//
// Four regions: x to int8; all chosen experts' up; relu² to int8; all chosen experts' down; then the sum. Within a region
// the items are (expert, panel), in that order, so that each thread reads long runs of memory.
#include "product.h"

namespace nemotron_h {
namespace NEMOTRON_H_LEVEL {
namespace {

// Visits sorted by expert: those of the i-th expert that has any are order[begin[i] .. begin[i + 1]).
struct Visits {
    size_t count = 0, distinct = 0;
    size_t* order;   // [V] visits; the token of visit v is v / k
    size_t* token;   // [V] order[i] / k
    size_t* expert;  // [distinct]
    size_t* begin;   // [distinct + 1]
};

bool sort_visits(const int64_t* experts, size_t visits, size_t k, size_t E, Visits& out, size_t* counts) {
    for (size_t e = 0; e < E; ++e) counts[e] = 0;
    for (size_t v = 0; v < visits; ++v) {
        if (experts[v] < 0 || static_cast<size_t>(experts[v]) >= E) return false;
        ++counts[experts[v]];
    }
    size_t at = 0;
    for (size_t e = 0; e < E; ++e) {
        if (counts[e] != 0) {
            out.expert[out.distinct] = e;
            out.begin[out.distinct++] = at;
        }
        const size_t count = counts[e];
        counts[e] = at;  // from here on: where the expert's next visit goes
        at += count;
    }
    out.begin[out.distinct] = at;
    for (size_t v = 0; v < visits; ++v) {
        const size_t to = counts[experts[v]]++;
        out.order[to] = v;
        out.token[to] = v / k;
    }
    out.count = visits;
    return true;
}

// One matrix of every chosen expert, by the rows of x that visit it: use(visit, first output, 16 outputs).
template <typename Use>
void visit_experts(const void* data, size_t bytes, const Weights& shape, const Visits& visits, const Rows& x,
                   const size_t* rows, const Use& use) {
    const size_t panels = shape.panels();
    parallel(visits.distinct * panels, panel_grain(shape), [&](size_t begin, size_t end) {
        for (size_t item = begin; item < end; ++item) {
            const size_t i = item / panels, panel = item % panels, first = visits.begin[i];
            Weights w = shape;
            w.data = static_cast<const char*>(data) + visits.expert[i] * bytes;
            panel_products(w, panel, x, rows + first, visits.begin[i + 1] - first, [&](size_t at, f32x16 y) {
                use(visits.order[first + at], visits.expert[i], panel * panel_rows, y);
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

}  // namespace

bool experts(const void* x, Dtype x_dtype, size_t x_stride, size_t M, size_t k, size_t E, const int64_t* experts,
             const float* weights, const void* up, size_t up_bytes, const void* down, size_t down_bytes, Format format,
             size_t group, ScaleType scale_type, Arithmetic arithmetic, size_t L, size_t F, const float* up_bias,
             const float* down_bias, void* out, Dtype out_dtype, void* scratch) noexcept {
    const FlushSubnormals flush;
    const size_t V = M * k;
    const bool wide = takes_float(format, arithmetic);
    char* at = static_cast<char*>(scratch);
    auto take = [&](size_t bytes) {
        char* taken = at;
        at += padded(bytes);
        return static_cast<void*>(taken);
    };
    size_t* index = static_cast<size_t*>(take((3 * V + 2 * E + 1) * sizeof(size_t)));
    Visits visits{0, 0, index, index + V, index + 2 * V, index + 2 * V + E};
    // An expert list holds at most min(V, E) entries; counts follow it.
    if (!sort_visits(experts, V, k, E, visits, static_cast<size_t*>(take(E * sizeof(size_t))))) return false;

    const Rows x_rows = place_rows(M, L, wide, at), h_rows = place_rows(V, F, wide, at);
    float* h = static_cast<float*>(take(V * F * sizeof(float)));
    float* y = static_cast<float*>(take(V * L * sizeof(float)));
    const Weights up_shape{nullptr, format, L, F, L, group, scale_type}, down_shape{nullptr, format, F, L, F, group, scale_type};

    about_to_read(up, 0);  // which of them the next token will choose, nobody knows
    prepare_rows(x, x_dtype, x_stride, M, L, x_rows);
    visit_experts(up, up_bytes, up_shape, visits, x_rows, visits.token, [&](size_t visit, size_t expert, size_t n, f32x16 u) {
        if (up_bias != nullptr) u = add(u, load_up_to(up_bias + expert * F + n, F - n));
        store_some(h + visit * F + n, relu2(u), F - n);
    });
    prepare_rows(h, F, V, F, h_rows);
    visit_experts(down, down_bytes, down_shape, visits, h_rows, visits.order, [&](size_t visit, size_t expert, size_t n, f32x16 u) {
        if (down_bias != nullptr) u = add(u, load_up_to(down_bias + expert * L + n, L - n));
        store_some(y + visit * L + n, u, L - n);
    });
    if (out_dtype == Dtype::float32) sum_visits(y, weights, M, k, L, static_cast<float*>(out));
    else sum_visits(y, weights, M, k, L, static_cast<bf16*>(out));
    return true;
}

}  // namespace NEMOTRON_H_LEVEL
}  // namespace nemotron_h
