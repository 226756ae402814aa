// Weighted sums and inner products of rows, in the vector registers that the compiler finds; shared by the CPU kernels.
//
// Rows go through the sums four at a time, side by side, while the next four are fetched: random rows are far from one
// another in memory, and one after the other each would be waited for.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace tenfold {

#if defined(__AVX512F__)
constexpr int REGISTER_BYTES = 64;
#else
constexpr int REGISTER_BYTES = 32;
#endif
constexpr int LANES = REGISTER_BYTES / 4;

typedef float floats __attribute__((vector_size(REGISTER_BYTES)));
typedef double doubles __attribute__((vector_size(REGISTER_BYTES)));
typedef uint32_t words __attribute__((vector_size(REGISTER_BYTES)));
typedef int32_t ints __attribute__((vector_size(REGISTER_BYTES)));

constexpr int SIDE_BY_SIDE = 4;
constexpr int64_t LINE_BYTES = 64;

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

inline float number(float value) { return value; }
inline double number(double value) { return value; }
inline float number(bfloat16 value) {
    const uint32_t bits = (uint32_t)value.bits << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}
inline float number(float16 value) {
    _Float16 result;
    std::memcpy(&result, &value, sizeof result);
    return (float)result;
}

// Vectors at any address: a copy through memcpy would take a detour over the stack
template <class V, class T>
inline V load_as(const T* from) {
    typedef V unaligned __attribute__((aligned(1), may_alias));
    return *(const unaligned*)from;
}

template <class V, class T>
inline void store_as(T* to, V values) {
    typedef V unaligned __attribute__((aligned(1), may_alias));
    *(unaligned*)to = values;
}

// How values of a type are read into sums and written from them: `sum` is one sum, `vector` a register of them
template <class T>
struct Values;

template <>
struct Values<float> {
    typedef float sum;
    typedef floats vector;
    static inline vector load(const float* from) { return load_as<vector>(from); }
    static inline void store(float* to, vector values) { store_as(to, values); }
};

template <>
struct Values<double> {
    typedef double sum;
    typedef doubles vector;
    static inline vector load(const double* from) { return load_as<vector>(from); }
    static inline void store(double* to, vector values) { store_as(to, values); }
};

template <>
struct Values<uint8_t> {
    typedef float sum;
    typedef floats vector;
    static inline vector load(const uint8_t* from) {
#if defined(__AVX512F__)
        return (vector)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(__AVX2__)
        return (vector)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
        vector values;
        for (int i = 0; i < LANES; i++) values[i] = from[i];
        return values;
#endif
    }
};

// Every other value in one register and those between in a second: a 16-bit value becomes a float by a shift or a mask in
// place, and back, where neighbours in one register would have to be moved apart first and together again afterwards
struct alternate {
    floats even, odd;
    inline alternate& operator+=(const alternate& other) {
        even += other.even, odd += other.odd;
        return *this;
    }
};
inline alternate operator*(float factor, const alternate& values) { return {factor * values.even, factor * values.odd}; }
inline alternate operator*(const alternate& a, const alternate& b) { return {a.even * b.even, a.odd * b.odd}; }

template <>
struct Values<bfloat16> {
    typedef float sum;
    typedef alternate vector;
    static inline vector load(const bfloat16* from) {
        const words both = load_as<words>(from);
        return {(floats)(both << 16), (floats)(both & 0xffff0000)};
    }
    static inline void store(bfloat16* to, const vector& values) {
        store_as(to, (rounded(values.even) >> 16) | (rounded(values.odd) & 0xffff0000));
    }
    // to the nearest, ties to even, in the upper half of each lane
    static inline words rounded(floats values) {
        const words bits = (words)values;
        // rounding up could turn a NaN into infinity
        const words nan = (words)(values != values);
        return ((bits + 0x7fff + ((bits >> 16) & 1)) & ~nan) | (nan & 0x7fc00000);
    }
};

template <>
struct Values<float16> {
    typedef float sum;
    typedef floats vector;
    static inline vector load(const float16* from) {
#if defined(__AVX512F__)
        return (vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__F16C__)
        return (vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
        vector values;
        for (int i = 0; i < LANES; i++) values[i] = (float)((const _Float16*)from)[i];
        return values;
#endif
    }
    static inline void store(float16* to, vector values) {
#if defined(__AVX512F__)
        _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
        _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT));
#else
        for (int i = 0; i < LANES; i++) ((_Float16*)to)[i] = (_Float16)values[i];
#endif
    }
};

template <class T>
constexpr int lanes() {
    return sizeof(typename Values<T>::vector) / sizeof(typename Values<T>::sum);
}

// Sums on their way, in the order that `vector` has them
template <class V, class S>
inline V load_sums(const S* from) {
    return load_as<V>(from);
}
template <class V, class S>
inline void store_sums(S* to, const V& values) {
    store_as(to, values);
}
template <>
inline alternate load_sums(const float* from) {
    return {load_as<floats>(from), load_as<floats>(from + LANES)};
}
template <>
inline void store_sums(float* to, const alternate& values) {
    store_as(to, values.even), store_as(to + LANES, values.odd);
}

template <class S, class V>
inline S total(const V& values) {
    S sum = 0;
    for (size_t lane = 0; lane < sizeof values / sizeof sum; lane++) sum += values[lane];
    return sum;
}
template <>
inline float total(const alternate& values) {
    return total<float>(values.even) + total<float>(values.odd);
}

// The first `count` lanes of memory, the others 0
template <class T>
inline typename Values<T>::vector load_some(const T* from, int64_t count) {
    T padded[lanes<T>()] = {};
    std::memcpy(padded, from, count * sizeof(T));
    return Values<T>::load(padded);
}

template <class T>
inline void store_some(T* to, const typename Values<T>::vector& values, int64_t count) {
    T padded[lanes<T>()];
    Values<T>::store(padded, values);
    std::memcpy(to, padded, count * sizeof(T));
}

// Sums are read and written in whole registers
constexpr int64_t sums_room(int64_t num_cols) { return num_cols + 2 * LANES; }

// One pass over COUNT rows and the sum of their offsets: `first` starts the sums, `last` writes them to `out`, otherwise they stay in `sums`
template <class T, class O, int COUNT>
inline void add_rows(const T* const* rows, const T* const* next, const typename Values<T>::sum* weights,
                     typename Values<T>::sum offset, int64_t begin, int64_t end, typename Values<T>::sum* sums,
                     bool first, bool last, O* out) {
    typedef Values<T> V;
    typedef typename V::vector vector;
    constexpr int64_t step = lanes<T>(), line = LINE_BYTES / sizeof(T);
    // out could overlap the lists for all the compiler knows: copies need no reading again
    const T *row[COUNT], *fetched[SIDE_BY_SIDE];
    typename V::sum weight[COUNT];
    for (int i = 0; i < COUNT; i++) row[i] = rows[i], weight[i] = weights[i];
    for (int i = 0; i < SIDE_BY_SIDE; i++) fetched[i] = next[i];
    auto add = [&](int64_t col) __attribute__((always_inline)) {
        vector acc = first ? vector{} : load_sums<vector>(sums + col);
        if constexpr (sizeof(T) == 1) acc += offset;
        for (int i = 0; i < COUNT; i++) acc += weight[i] * V::load(row[i] + col);
        if (last)
            Values<O>::store(out + col, acc);
        else
            store_sums(sums + col, acc);
    };
    int64_t col = begin;
    for (; col + line <= end; col += line) {
        for (int i = 0; i < SIDE_BY_SIDE; i++) __builtin_prefetch(fetched[i] + col);
#pragma GCC unroll 8
        for (int64_t part = 0; part < line; part += step) add(col + part);
    }
    for (; col + step <= end; col += step) add(col);
    if (col < end) {
        vector acc = first ? vector{} : load_sums<vector>(sums + col);
        if constexpr (sizeof(T) == 1) acc += offset;
        for (int i = 0; i < COUNT; i++) acc += weights[i] * load_some(rows[i] + col, end - col);
        if (last)
            store_some(out + col, acc, end - col);
        else
            store_sums(sums + col, acc);
    }
}

// out[begin:end] = sum_i (weights[i] rows[i][begin:end] + offsets[i]), count > 0, with offsets for 8-bit rows only; rows
// has SIDE_BY_SIDE more entries, which are fetched only; sums has room for sums_room(end) values. Offsets enter with their rows:
// added up apart they would cancel against large sums
template <class T, class O>
void weighted_sum(const T* const* rows, const typename Values<T>::sum* weights, int64_t count,
                  const typename Values<T>::sum* offsets, int64_t begin, int64_t end, typename Values<T>::sum* sums,
                  O* out) {
    for (int64_t at = 0; at < count; at += SIDE_BY_SIDE) {
        const int64_t rest = count - at;
        const bool first = at == 0, last = rest <= SIDE_BY_SIDE;
        const T* const* now = rows + at;
        const T* const* next = now + std::min<int64_t>(rest, SIDE_BY_SIDE);
        typename Values<T>::sum offset = 0;
        if (offsets)
            for (int64_t i = 0; i < rest && i < SIDE_BY_SIDE; i++) offset += offsets[at + i];
        if (rest >= 4)
            add_rows<T, O, 4>(now, next, weights + at, offset, begin, end, sums, first, last, out);
        else if (rest == 3)
            add_rows<T, O, 3>(now, next, weights + at, offset, begin, end, sums, first, last, out);
        else if (rest == 2)
            add_rows<T, O, 2>(now, next, weights + at, offset, begin, end, sums, first, last, out);
        else
            add_rows<T, O, 1>(now, next, weights + at, offset, begin, end, sums, first, last, out);
    }
}

// products[i] = <vector, rows[i]> for COUNT rows
template <class T, int COUNT>
inline void inner_products(const T* const* rows, const T* const* next, const T* with, int64_t num_cols,
                           typename Values<T>::sum* products) {
    typedef Values<T> V;
    typedef typename V::vector vector;
    constexpr int64_t step = lanes<T>(), line = LINE_BYTES / sizeof(T);
    vector acc[COUNT] = {};
    auto add = [&](int64_t col) __attribute__((always_inline)) {
        const vector values = V::load(with + col);
        for (int i = 0; i < COUNT; i++) acc[i] += values * V::load(rows[i] + col);
    };
    int64_t col = 0;
    for (; col + line <= num_cols; col += line) {
        for (int i = 0; i < SIDE_BY_SIDE; i++) __builtin_prefetch(next[i] + col);
#pragma GCC unroll 4
        for (int64_t part = 0; part < line; part += step) add(col + part);
    }
    for (; col + step <= num_cols; col += step) add(col);
    if (col < num_cols) {
        const vector values = load_some(with + col, num_cols - col);
        for (int i = 0; i < COUNT; i++) acc[i] += values * load_some(rows[i] + col, num_cols - col);
    }
    for (int i = 0; i < COUNT; i++) products[i] = total<typename V::sum>(acc[i]);
}

// Zeros, past the caches where they would only push other data out
inline void fill_zeros(char* to, int64_t num_bytes, bool past_caches) {
#if defined(__SSE2__)
    if (past_caches && num_bytes >= 4096) {
        const int64_t head = (16 - (uintptr_t)to % 16) % 16;
        std::memset(to, 0, head);
        to += head, num_bytes -= head;
        const __m128i zero = _mm_setzero_si128();
        for (; num_bytes >= 64; to += 64, num_bytes -= 64)
            for (int i = 0; i < 4; i++) _mm_stream_si128((__m128i*)to + i, zero);
        _mm_sfence();
    }
#endif
    std::memset(to, 0, num_bytes);
}

// Columns cut so that every thread has work where there are fewer tokens than threads; parts are whole cache lines
struct Parts {
    int64_t count, width;
    Parts(int64_t num_tokens, int64_t num_cols, int64_t num_threads, int64_t value_bytes) : count(1), width(num_cols) {
        if (num_threads > 1 && num_tokens < 8 * num_threads && num_tokens % num_threads != 0) {
            const int64_t line = std::max<int64_t>(LINE_BYTES / value_bytes, 16);
            width = ((num_cols + num_threads - 1) / num_threads + line - 1) / line * line;
            count = (num_cols + width - 1) / width;
        }
    }
};

// work(i) for i in [begin, end) on each thread, equal shares; one thread is the caller, without OpenMP
template <class F>
void share(int64_t num_tasks, int64_t num_threads, F work) {
    if (num_threads <= 1 || num_tasks <= 1) {
        work(int64_t(0), num_tasks);
        return;
    }
#pragma omp parallel num_threads(num_threads)
    {
        const int64_t here = omp_get_thread_num(), all = omp_get_num_threads();
        work(num_tasks * here / all, num_tasks * (here + 1) / all);
    }
}

}  // namespace tenfold
