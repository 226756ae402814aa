// CPU kernels of the weighted gather: forward, both gradients, and the sort. README.md derives them.
//
// Shapes: table (U, N, H) with `grouped`, else (R, H); indices (T,) or (T, M); weights (T, M). In the forward weights have
// any of the types, in the backward that of the sums.
// Functions give 0, or 1 for an index out of range (the output is then incomplete), or 2 for an unknown type.
#include "rows.h"

using namespace tenfold;

namespace {

struct Shape {
    int64_t num_tokens, num_terms, num_cols, num_groups, stride_group, stride_row, grouped, num_threads;
};

// Row pointers of a token's terms; false where an index is out of range
template <class T>
bool find_rows(const T* table, const int64_t* indices, const Shape& s, int64_t token, int64_t count, const T** rows) {
    if (s.grouped) {
        const int64_t group = indices[token];
        if (group < 0 || group >= s.num_groups) return false;
        for (int64_t i = 0; i < count; i++) rows[i] = table + group * s.stride_group + i * s.stride_row;
        return true;
    }
    for (int64_t i = 0; i < count; i++) {
        const int64_t row = indices[token * s.num_terms + i];
        if (row < 0 || row >= s.num_groups) return false;
        rows[i] = table + row * s.stride_row;
    }
    return true;
}

// The same, and behind them the first rows of the next token, which are fetched while these are summed
template <class T>
bool find_rows_and_next(const T* table, const int64_t* indices, const Shape& s, int64_t token, int64_t end,
                        const T** rows) {
    if (!find_rows(table, indices, s, token, s.num_terms, rows)) return false;
    const T** behind = rows + s.num_terms;
    for (int i = 0; i < SIDE_BY_SIDE; i++) behind[i] = rows[s.num_terms - 1];
    if (token + 1 < end) find_rows(table, indices, s, token + 1, std::min<int64_t>(s.num_terms, SIDE_BY_SIDE), behind);
    return true;
}

// Factors of a token's terms in the type of the sums; `copy` holds them where they are of another type
template <class S>
struct Factors {
    const void* values;
    int64_t type;
    std::vector<S> copy;

    const S* at(int64_t first, int64_t count) {
        switch (type) {
            case 0: return converted((const float*)values + first, count);
            case 1: return converted((const double*)values + first, count);
            case 2: return converted((const bfloat16*)values + first, count);
            default: return converted((const float16*)values + first, count);
        }
    }

   private:
    const S* converted(const S* from, int64_t) { return from; }
    template <class W>
    const S* converted(const W* from, int64_t count) {
        copy.resize(count);
        for (int64_t i = 0; i < count; i++) copy[i] = (S)number(from[i]);
        return copy.data();
    }
};

template <class T>
int forward(const T* table, const int64_t* indices, const void* weights, int64_t weights_type, T* out, const Shape& s) {
    const Parts parts(s.num_tokens, s.num_cols, s.num_threads, sizeof(T));
    std::atomic<int> failed(0);
    share(s.num_tokens * parts.count, s.num_threads, [&](int64_t begin, int64_t end) {
        std::vector<const T*> rows(s.num_terms + SIDE_BY_SIDE);
        std::vector<typename Values<T>::sum> sums(s.num_terms > SIDE_BY_SIDE ? sums_room(s.num_cols) : 0);
        Factors<typename Values<T>::sum> factors{weights, weights_type, {}};
        for (int64_t task = begin; task < end; task++) {
            const int64_t token = task / parts.count, from = task % parts.count * parts.width;
            if (!find_rows_and_next(table, indices, s, token, s.num_tokens, rows.data())) {
                failed = 1;
                return;
            }
            weighted_sum<T, T>(rows.data(), factors.at(token * s.num_terms, s.num_terms), s.num_terms, nullptr, from,
                               std::min(from + parts.width, s.num_cols), sums.data(), out + token * s.num_cols);
        }
    });
    return failed;
}

template <class T>
int grad_weights(const T* grad, const T* table, const int64_t* indices, typename Values<T>::sum* out, const Shape& s) {
    std::atomic<int> failed(0);
    // terms are shared out where tokens are few
    const int64_t blocks = s.num_tokens < 8 * s.num_threads ? (s.num_terms + SIDE_BY_SIDE - 1) / SIDE_BY_SIDE : 1;
    const int64_t width = (s.num_terms + blocks - 1) / blocks;
    share(s.num_tokens * blocks, s.num_threads, [&](int64_t begin, int64_t end) {
        std::vector<const T*> rows(s.num_terms + SIDE_BY_SIDE);
        for (int64_t task = begin; task < end; task++) {
            const int64_t token = task / blocks, first = task % blocks * width;
            if (!find_rows_and_next(table, indices, s, token, s.num_tokens, rows.data())) {
                failed = 1;
                return;
            }
            const T* with = grad + token * s.num_cols;
            const int64_t stop = std::min(first + width, s.num_terms);
            for (int64_t at = first; at < stop; at += SIDE_BY_SIDE) {
                const T* const* now = rows.data() + at;
                auto* products = out + token * s.num_terms + at;
                const int64_t rest = stop - at;
                if (rest >= 4)
                    inner_products<T, 4>(now, now + 4, with, s.num_cols, products);
                else if (rest == 3)
                    inner_products<T, 3>(now, now + 3, with, s.num_cols, products);
                else if (rest == 2)
                    inner_products<T, 2>(now, now + 2, with, s.num_cols, products);
                else
                    inner_products<T, 1>(now, now + 1, with, s.num_cols, products);
            }
        }
    });
    return failed;
}

template <class T>
void grad_table(const T* grad, const typename Values<T>::sum* weights, const int64_t* order, const int64_t* offsets,
                bool zeroed, T* out, const Shape& s) {
    typedef typename Values<T>::sum sum;
    const int64_t rows_per_group = s.grouped ? s.num_terms : 1, terms_per_token = s.grouped ? 1 : s.num_terms;
    const int64_t group_values = rows_per_group * s.num_cols, total_terms = offsets[s.num_groups];
    const bool past_caches = s.num_groups * group_values * (int64_t)sizeof(T) >= (int64_t(8) << 20);
    // a row that takes more than its share of all terms would keep one thread busy: its columns are shared out instead
    const int64_t long_terms = s.num_threads > 1 ? std::max<int64_t>(64, total_terms / (4 * s.num_threads)) : total_terms;

    struct Scratch {
        std::vector<const T*> rows;
        std::vector<sum> factors, sums;
    };
    auto sum_group = [&](int64_t group, int64_t from, int64_t to, Scratch& scratch) {
        const int64_t begin = offsets[group], count = offsets[group + 1] - begin;
        scratch.rows.resize(count + SIDE_BY_SIDE);
        scratch.factors.resize(count);
        scratch.sums.resize(sums_room(s.num_cols));
        for (int64_t i = 0; i < count; i++) scratch.rows[i] = grad + order[begin + i] / terms_per_token * s.num_cols;
        for (int i = 0; i < SIDE_BY_SIDE; i++) scratch.rows[count + i] = scratch.rows[count - 1];
        for (int64_t row = 0; row < rows_per_group; row++) {
            for (int64_t i = 0; i < count; i++) scratch.factors[i] = weights[order[begin + i] * rows_per_group + row];
            weighted_sum<T, T>(scratch.rows.data(), scratch.factors.data(), count, nullptr, from, to, scratch.sums.data(),
                               out + group * group_values + row * s.num_cols);
        }
    };
    auto run = [&](int64_t begin, int64_t end, Scratch& scratch) {
        for (int64_t group = begin; group < end; group++) {
            const int64_t count = offsets[group + 1] - offsets[group];
            if (count > 0) {
                if (count <= long_terms) sum_group(group, 0, s.num_cols, scratch);
                continue;
            }
            int64_t last = group;
            while (last + 1 < end && offsets[last + 2] == offsets[group]) last++;
            if (!zeroed)
                fill_zeros((char*)(out + group * group_values), (last - group + 1) * group_values * sizeof(T), past_caches);
            group = last;
        }
    };
    if (s.num_threads <= 1) {
        Scratch scratch;
        run(0, s.num_groups, scratch);
        return;
    }
    const int64_t chunk = std::max<int64_t>(1, s.num_groups / (16 * s.num_threads));
    const int64_t num_chunks = (s.num_groups + chunk - 1) / chunk;
#pragma omp parallel num_threads(s.num_threads)
    {
        Scratch scratch;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < num_chunks; i++) run(i * chunk, std::min((i + 1) * chunk, s.num_groups), scratch);
        if (total_terms > long_terms) {
            const int64_t line = std::max<int64_t>(LINE_BYTES / sizeof(T), 16);
            const int64_t width = ((s.num_cols + s.num_threads - 1) / s.num_threads + line - 1) / line * line;
            const int64_t parts = (s.num_cols + width - 1) / width;
#pragma omp for schedule(dynamic, 1)
            for (int64_t part = 0; part < parts; part++)
                for (int64_t group = 0; group < s.num_groups; group++)
                    if (offsets[group + 1] - offsets[group] > long_terms)
                        sum_group(group, part * width, std::min((part + 1) * width, s.num_cols), scratch);
        }
    }
}

}  // namespace

#define BY_TYPE(type, call)                                 \
    switch (type) {                                         \
        case 0: { typedef float T; call; }                  \
        case 1: { typedef double T; call; }                 \
        case 2: { typedef bfloat16 T; call; }               \
        case 3: { typedef float16 T; call; }                \
    }                                                       \
    return 2;

extern "C" {

int tenfold_gather(int64_t type, const void* table, const int64_t* indices, int64_t weights_type, const void* weights,
                   void* out, int64_t num_tokens, int64_t num_terms, int64_t num_cols, int64_t num_groups,
                   int64_t stride_group, int64_t stride_row, int64_t grouped, int64_t num_threads) {
    const Shape s{num_tokens, num_terms, num_cols, num_groups, stride_group, stride_row, grouped, num_threads};
    if (weights_type < 0 || weights_type > 3) return 2;
    BY_TYPE(type, return forward<T>((const T*)table, indices, weights, weights_type, (T*)out, s))
}

int tenfold_gather_grad_weights(int64_t type, const void* grad, const void* table, const int64_t* indices, void* out,
                                int64_t num_tokens, int64_t num_terms, int64_t num_cols, int64_t num_groups,
                                int64_t stride_group, int64_t stride_row, int64_t grouped, int64_t num_threads) {
    const Shape s{num_tokens, num_terms, num_cols, num_groups, stride_group, stride_row, grouped, num_threads};
    BY_TYPE(type, return grad_weights<T>((const T*)grad, (const T*)table, indices, (Values<T>::sum*)out, s))
}

int tenfold_gather_grad_table(int64_t type, const void* grad, const void* weights, const int64_t* order,
                              const int64_t* offsets, int64_t zeroed, void* out, int64_t num_terms, int64_t num_cols,
                              int64_t num_groups, int64_t grouped, int64_t num_threads) {
    const Shape s{0, num_terms, num_cols, num_groups, 0, 0, grouped, num_threads};
    BY_TYPE(type, grad_table<T>((const T*)grad, (const Values<T>::sum*)weights, order, offsets, zeroed, (T*)out, s);
            return 0)
}

// Counting sort of ids: order (num_ids,), offsets (num_groups + 1,); equal ids keep their order
int tenfold_sort(const int64_t* ids, int64_t num_ids, int64_t num_groups, int64_t* order, int64_t* offsets) {
    std::memset(offsets, 0, (num_groups + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < num_ids; i++) {
        if (ids[i] < 0 || ids[i] >= num_groups) return 1;
        offsets[ids[i] + 1]++;
    }
    for (int64_t group = 0; group < num_groups; group++) offsets[group + 1] += offsets[group];
    // the starts move to the ends while terms are dealt out, and are shifted back
    for (int64_t i = 0; i < num_ids; i++) order[offsets[ids[i]]++] = i;
    for (int64_t group = num_groups; group > 0; group--) offsets[group] = offsets[group - 1];
    offsets[0] = 0;
    return 0;
}
}
