// The float half of every variant, written once over a vector of 16 floats `V` that each variant defines. Every lane does the
// same IEEE operation in the same order everywhere, and sums go from 16 partial sums down a fixed tree, so all variants
// give the same bits. No libm: its functions differ between systems.
//
// V has: kQueries (how many query rows fit its registers), load, store, set, zero, +, -, *, / , fma(a, b, c) = a b + c, larger, smaller, nearest (half to even), power_of_two (of
// integral floats), sum (tree: 8, 4, 2, 1), top, load_half, store_half, load_int8, store_int8.
#pragma once

#include "ops.h"

namespace pf {
namespace {

template <typename V> inline V exponential(V x) {
    // x = n ln 2 + r; e^r by its series to r^7 (|r| < 0.35: relative error below 2e-8), times 2^n.
    x = V::larger(V::smaller(x, V::set(88.0f)), V::set(-87.0f));
    V n = V::nearest(x * V::set(1.44269504f));
    V r = V::fma(n, V::set(-0.693359375f), x);
    r = V::fma(n, V::set(2.12194440e-4f), r);
    V p = V::set(1.0f / 5040.0f);
    p = V::fma(p, r, V::set(1.0f / 720.0f));
    p = V::fma(p, r, V::set(1.0f / 120.0f));
    p = V::fma(p, r, V::set(1.0f / 24.0f));
    p = V::fma(p, r, V::set(1.0f / 6.0f));
    p = V::fma(p, r, V::set(0.5f));
    p = V::fma(p, r, V::set(1.0f));
    p = V::fma(p, r, V::set(1.0f));
    return p * V::power_of_two(n);
}

// Natural logarithm of a positive normal number: x = 2^n m, ln m = 2 atanh((m - 1) / (m + 1)).
inline float logarithm(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    int n = int(bits >> 23) - 127;
    bits = (bits & 0x7fffffu) | 0x3f800000u;
    float m;
    memcpy(&m, &bits, 4);
    if (m > 1.41421356f) {
        m *= 0.5f;
        n += 1;
    }
    float z = (m - 1.0f) / (m + 1.0f), z2 = z * z;
    float p = 1.0f / 9.0f;
    p = __builtin_fmaf(p, z2, 1.0f / 7.0f);
    p = __builtin_fmaf(p, z2, 0.2f);
    p = __builtin_fmaf(p, z2, 1.0f / 3.0f);
    p = __builtin_fmaf(p, z2, 1.0f);
    return __builtin_fmaf(float(n), 0.693147181f, 2.0f * z * p);
}

template <typename V> struct FloatOps {
    // Symmetric, one scale a token: max|x| / 127, codes rounded half to even (quant/primitives.py). k is a multiple of 32.
    static void quantize_row(const float *x, int k, int8_t *codes, float *scale, int32_t *offsets) {
        V largest = V::zero();
        for (int i = 0; i < k; i += 16) largest = V::larger(largest, V::abs(V::load(x + i)));
        *scale = V::top(largest) / 127.0f;
        V divisor = V::set(*scale == 0.0f ? 1.0f : *scale), high = V::set(127.0f), low = V::set(-127.0f);
        for (int i = 0; i < k; i += 16) {
            V::store_int8(codes + i, V::larger(V::smaller(V::nearest(V::load(x + i) / divisor), high), low));
        }
        for (int g = 0; g < k / kGroup; ++g) {
            offsets[g] = -8 * V::sum_codes(codes + g * kGroup);
        }
    }

    static void rms_norm(const float *x, const float *weight, int n, float eps, float *out) {
        V squares = V::zero();
        for (int i = 0; i < n; i += 16) {
            V v = V::load(x + i);
            squares = V::fma(v, v, squares);
        }
        V scale = V::set(1.0f / __builtin_sqrtf(V::sum(squares) / float(n) + eps));
        for (int i = 0; i < n; i += 16) {
            V v = V::load(x + i) * scale;
            V::store(out + i, weight == nullptr ? v : v * V::load(weight + i));
        }
    }

    // As modeling.layers.rotate: x * cos + roll(x) * sin, the sign being in `sin`. head_dim is a multiple of 32.
    static void rope(float *x, int head_dim, Rope table) {
        int half = head_dim / 2;
        for (int i = 0; i < half; i += 16) {
            V a = V::load(x + i), b = V::load(x + half + i);
            V::store(x + i, a * V::load(table.cos + i) + b * V::load(table.sin + i));
            V::store(x + half + i, b * V::load(table.cos + half + i) + a * V::load(table.sin + half + i));
        }
    }

    static void swiglu(const float *gate, const float *up, int n, float *out) {
        V one = V::set(1.0f);
        for (int i = 0; i < n; i += 16) {
            V g = V::load(gate + i);
            V::store(out + i, g / (one + exponential(V::zero() - g)) * V::load(up + i));
        }
    }

    static void add(float *x, const float *y, int n) {
        for (int i = 0; i < n; i += 16) V::store(x + i, V::load(x + i) + V::load(y + i));
    }

    static void log_sum_exp(const float *x, int n, float *result) {
        float top = x[0];
        for (int i = 1; i < n; ++i) top = larger(top, x[i]);
        V sum = V::zero(), shift = V::set(top);
        int i = 0;
        for (; i + 16 <= n; i += 16) sum = sum + exponential(V::load(x + i) - shift);
        if (i < n) {
            float rest[16];
            for (int j = 0; j < 16; ++j) rest[j] = i + j < n ? x[i + j] : -1e30f;
            V part = exponential(V::load(rest) - shift);
            float parts[16];
            V::store(parts, part);
            for (int j = n - i; j < 16; ++j) parts[j] = 0.0f;
            sum = sum + V::load(parts);
        }
        *result = top + logarithm(V::sum(sum));
    }

    static void exponentials(float *x, int n) {
        for (int i = 0; i < n; i += 16) V::store(x + i, exponential(V::load(x + i)));
    }

    // Each logit: 16 lanes of fused multiply-adds over the columns in order, then the tree of V::sum. T tokens by E experts at
    // once only save loads.
    template <int T, int E> static void router_tile(const float *x, const float *w, int n, float *logits, int stride) {
        V acc[T][E];
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
            for (int e = 0; e < E; ++e) acc[t][e] = V::zero();
        }
        for (int i = 0; i < n; i += 16) {
            V row[E];
#pragma GCC unroll 4
            for (int e = 0; e < E; ++e) row[e] = V::load(w + size_t(e) * size_t(n) + i);
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
                V v = V::load(x + size_t(t) * size_t(n) + i);
#pragma GCC unroll 4
                for (int e = 0; e < E; ++e) acc[t][e] = V::fma(v, row[e], acc[t][e]);
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
            for (int e = 0; e < E; ++e) logits[t * stride + e] = V::sum(acc[t][e]);
        }
    }

    static void router(const float *x, const float *w, int tokens, int experts, int n, float *logits) {
        constexpr int S = V::kQueries >= 8 ? 4 : 2;  // what the registers hold
        for (int e = 0; e < experts; e += S) {
            const float *rows = w + size_t(e) * size_t(n);
            bool whole = experts - e >= S;
            int t = 0;
            for (; whole && t + S <= tokens; t += S) router_tile<S, S>(x + size_t(t) * size_t(n), rows, n, logits + t * experts + e, experts);
            for (; t < tokens; ++t) {
                const float *one = x + size_t(t) * size_t(n);
                float *out = logits + t * experts + e;
                if (whole) router_tile<1, S>(one, rows, n, out, experts);
                else for (int j = 0; j < experts - e; ++j) router_tile<1, 1>(one, rows + size_t(j) * size_t(n), n, out + j, experts);
            }
        }
    }

    static void add_scaled(float *x, const float *y, float scale, int n) {
        V factor = V::set(scale);
        for (int i = 0; i < n; i += 16) V::store(x + i, V::fma(factor, V::load(y + i), V::load(x + i)));
    }

    // Four streams, asked for early: the fastest way found to read memory on one core.
    static uint64_t read(const uint8_t *data, size_t bytes) {
        typename V::Sum sums[4] = {V::no_sum(), V::no_sum(), V::no_sum(), V::no_sum()};
        size_t part = bytes / 4 / 64 * 64;
        for (size_t i = 0; i < part; i += 64) {
            for (size_t s = 0; s < 4; ++s) {
                __builtin_prefetch(data + s * part + i + 4096, 0, 2);
                sums[s] = V::add_line(sums[s], data + s * part + i);
            }
        }
        return V::all(sums[0]) + V::all(sums[1]) + V::all(sums[2]) + V::all(sums[3]);
    }
};

} // namespace
} // namespace pf
