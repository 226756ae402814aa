// CPU kernel of the sign hash and the gather behind it, one call per layer. README.md derives it.
//
// Phase one hashes: the sub-vectors of all tokens are shared out to the threads. Phase two sums rows: tokens are shared
// out, or parts of the columns where there are fewer tokens than threads.
#include "rows.h"

using namespace tenfold;

namespace {

// exp(x) for x in [-87, 0] to about 1e-7, as 2^n times a polynomial in what is left
inline floats exp_negative(floats x) {
    const floats lowest = floats{} - 87.0f;
    x = x < lowest ? lowest : x;
    const ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, ints);
    const floats whole = __builtin_convertvector(n, floats);
    const floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (floats)((n + 127) << 23);
}

struct Hash {
    int64_t num_tokens, width, num_bits, num_tables, l1;
    float two_over_t;
};

// Rows and weights of tables [first, last) of one token; false where a value is NaN or infinite
bool hash_tables(const float* x, const Hash& h, int64_t first, int64_t last, float* buffer, int64_t* rows, float* weights) {
    const int64_t begin = first * h.num_bits, end = std::min(last * h.num_bits, h.width);
    ints bad = {};
    for (int64_t at = begin; at < end; at += LANES) {
        const int64_t count = std::min<int64_t>(LANES, end - at);
        const floats z = count == LANES ? load_as<floats>(x + at) : load_some(x + at, count);
        const floats size = (floats)((words)z & 0x7fffffff);
        bad |= ~(size <= __FLT_MAX__);
        const floats factor = 1.0f + exp_negative(size * -h.two_over_t);
        // the buffer is a register longer than the values
        store_as(buffer + (at - begin), factor);
    }
    for (int64_t table = first; table < last; table++) {
        const int64_t start = table * h.num_bits, stop = std::min(start + h.num_bits, h.width);
        int64_t code = 0;
        float product = 1, length = 0;
        for (int64_t at = start; at < stop; at++) {
            code = code * 2 + (x[at] >= 0);
            product *= buffer[at - begin];
            length += std::fabs(x[at]);
        }
        // what a shorter last sub-vector lacks are zeros, which count as positive
        for (int64_t at = stop; at < start + h.num_bits; at++) code = code * 2 + 1;
        rows[table] = (table << h.num_bits) + code;
        weights[table] = h.l1 ? length / product : 1 / product;
    }
    int any = 0;
    for (int lane = 0; lane < LANES; lane++) any |= bad[lane];
    return !any;
}

int hash_all(const float* x, const Hash& h, int64_t num_threads, int64_t* rows, float* weights) {
    std::atomic<int> failed(0);
    // a thread is worth waking for some thousand values
    const int64_t threads = std::min(num_threads, h.num_tokens * h.width / 4096 + 1);
    const int64_t parts = h.num_tokens < threads ? threads : 1;
    share(h.num_tokens * parts, threads, [&](int64_t begin, int64_t end) {
        std::vector<float> buffer(h.width + LANES);
        for (int64_t task = begin; task < end; task++) {
            const int64_t token = task / parts, part = task % parts;
            if (!hash_tables(x + token * h.width, h, h.num_tables * part / parts, h.num_tables * (part + 1) / parts,
                             buffer.data(), rows + token * h.num_tables, weights + token * h.num_tables))
                failed = 1;
        }
    });
    return failed;
}

template <class T, class O, bool RECORDS>
void gather(const T* table, int64_t stride_row, const int64_t* rows, const float* weights, int64_t num_tokens,
            int64_t num_terms, int64_t num_cols, int64_t num_threads, O* out) {
    const Parts parts(num_tokens, num_cols, num_threads, sizeof(T));
    share(num_tokens * parts.count, num_threads, [&](int64_t begin, int64_t end) {
        std::vector<const T*> at(num_terms + SIDE_BY_SIDE);
        std::vector<float> sums(sums_room(num_cols)), factors(RECORDS ? num_terms : 0), offsets(factors.size());
        for (int64_t task = begin; task < end; task++) {
            const int64_t token = task / parts.count, from = task % parts.count * parts.width;
            const int64_t* mine = rows + token * num_terms;
            const float* scale = weights + token * num_terms;
            const int64_t limit = num_tokens * num_terms - token * num_terms;
            for (int64_t i = 0; i < num_terms + SIDE_BY_SIDE; i++)
                at[i] = table + mine[std::min(i, limit - 1)] * stride_row;
            if (RECORDS) {
                for (int64_t i = 0; i < num_terms; i++) {
                    float both[2];
                    std::memcpy(both, at[i] + num_cols, sizeof both);
                    factors[i] = scale[i] * both[0];
                    offsets[i] = scale[i] * both[1];
                }
                scale = factors.data();
            }
            weighted_sum<T, O>(at.data(), scale, num_terms, RECORDS ? offsets.data() : nullptr, from, std::min(from + parts.width, num_cols),
                               sums.data(), out + token * num_cols);
        }
    });
}

}  // namespace

extern "C" {

// rows and weights (T, K) of x (T, d); 1 where x holds NaN or infinity
int tenfold_sign_hash(const float* x, int64_t num_tokens, int64_t width, int64_t num_bits, int64_t l1, double two_over_t,
                      int64_t* rows, float* weights, int64_t num_threads) {
    const Hash h{num_tokens, width, num_bits, (width + num_bits - 1) / num_bits, l1, (float)two_over_t};
    return hash_all(x, h, num_threads, rows, weights);
}

// out (T, H) of x (T, d) and a table of float32 (0), bfloat16 (2), float16 (3) or 8-bit records (4, float32 sums)
int tenfold_hash_gather(int64_t type, const float* x, int64_t num_tokens, int64_t width, int64_t num_bits, int64_t l1,
                        double two_over_t, const void* table, int64_t stride_row, int64_t num_cols, void* out,
                        int64_t num_threads) {
    const Hash h{num_tokens, width, num_bits, (width + num_bits - 1) / num_bits, l1, (float)two_over_t};
    std::vector<int64_t> rows(num_tokens * h.num_tables);
    std::vector<float> weights(num_tokens * h.num_tables);
    if (hash_all(x, h, num_threads, rows.data(), weights.data())) return 1;
    const int64_t t = num_tokens, k = h.num_tables;
    const int64_t threads = t * k * num_cols < 32768 ? 1 : num_threads;
    const int64_t* r = rows.data();
    const float* w = weights.data();
    switch (type) {
        case 0: gather<float, float, false>((const float*)table, stride_row, r, w, t, k, num_cols, threads, (float*)out); break;
        case 2: gather<bfloat16, bfloat16, false>((const bfloat16*)table, stride_row, r, w, t, k, num_cols, threads, (bfloat16*)out); break;
        case 3: gather<float16, float16, false>((const float16*)table, stride_row, r, w, t, k, num_cols, threads, (float16*)out); break;
        case 4: gather<uint8_t, float, true>((const uint8_t*)table, stride_row, r, w, t, k, num_cols, threads, (float*)out); break;
        default: return 2;
    }
    return 0;
}
}
