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

    // ---- attention ----------------------------------------------------------------------------------------------

    static uint8_t *block_of(KvRing ring, int position) {
        return ring.blocks + size_t((position / kPanel) % ring.count) * ring.layout.block_bytes();
    }

    static void store_kv(KvRing ring, int position, const float *key, const float *value) {
        const KvLayout &layout = ring.layout;
        uint8_t *block = block_of(ring, position);
        int lane = position % kPanel, d = layout.head_dim;
        if (layout.type == PF_KV_F32) {
            float *keys = reinterpret_cast<float *>(block);
            for (int i = 0; i < d; ++i) keys[i * kPanel + lane] = key[i];
            memcpy(block + layout.values() + size_t(lane) * d * 4, value, size_t(d) * 4);
        } else if (layout.type == PF_KV_F16) {
            uint16_t halves[16], *keys = reinterpret_cast<uint16_t *>(block);
            uint16_t *values = reinterpret_cast<uint16_t *>(block + layout.values()) + lane * d;
            for (int i = 0; i < d; i += 16) {
                V::store_half(halves, V::load(key + i));
                for (int j = 0; j < 16; ++j) keys[(i + j) * kPanel + lane] = halves[j];
                V::store_half(values + i, V::load(value + i));
            }
        } else {
            int8_t codes[kMaxHeadDim];
            int32_t unused[kMaxHeadDim / kGroup];
            quantize_row(key, d, codes, reinterpret_cast<float *>(block + layout.key_scales()) + lane, unused);
            for (int i = 0; i < d; ++i) block[(i / 4 * kPanel + lane) * 4 + i % 4] = uint8_t(codes[i]);
            int8_t *values = reinterpret_cast<int8_t *>(block + layout.values()) + lane * d;
            quantize_row(value, d, values, reinterpret_cast<float *>(block + layout.value_scales()) + lane, unused);
        }
    }

    // For up to kQueryTile queries of one key/value head: softmax(scale q k) v. Queries of the tile may see different tokens.
    static void attend(KvRing ring, const Query *queries, int count, float scale, float *scores) {
        int first = queries[0].first, last = queries[0].last;
        for (int i = 1; i < count; ++i) {
            first = smaller(first, queries[i].first);
            last = larger(last, queries[i].last);
        }
        int begin = first / kPanel, end = last / kPanel + 1, stride = (end - begin) * kPanel;
        constexpr int Q = V::kQueries;
        for (int i = 0; i < count; i += Q) {
            int part = smaller(count - i, Q);
            float *out = scores + i * stride;
            if (ring.layout.type == PF_KV_INT8) int8_scores(ring, queries + i, part, scale, begin, end, out);
            else if (ring.layout.type == PF_KV_F16) key_scores<Float16>(ring, queries + i, part, scale, begin, end, out);
            else key_scores<Float32>(ring, queries + i, part, scale, begin, end, out);
        }
        float sums[kQueryTile];
        for (int i = 0; i < count; ++i) {
            int hidden = queries[i].first - begin * kPanel, seen = queries[i].last - begin * kPanel + 1;
            sums[i] = softmax_numerators(scores + i * stride, hidden, seen, stride);
        }
        for (int i = 0; i < count; i += Q) {
            int part = smaller(count - i, Q);
            float *p = scores + i * stride;
            if (ring.layout.type == PF_KV_INT8) weigh_values<Int8>(ring, queries + i, part, begin, end, p, sums + i);
            else if (ring.layout.type == PF_KV_F16) weigh_values<Float16>(ring, queries + i, part, begin, end, p, sums + i);
            else weigh_values<Float32>(ring, queries + i, part, begin, end, p, sums + i);
        }
    }

    static constexpr int kMaxHeadDim = 512;

    struct Float32 {
        static constexpr size_t size = 4;
        static V load(const uint8_t *p) { return V::load(reinterpret_cast<const float *>(p)); }
    };
    struct Float16 {
        static constexpr size_t size = 2;
        static V load(const uint8_t *p) { return V::load_half(reinterpret_cast<const uint16_t *>(p)); }
    };
    struct Int8 {
        static constexpr size_t size = 1;
        static V load(const uint8_t *p) { return V::load_int8(reinterpret_cast<const int8_t *>(p)); }
    };

    // A lane is a token: each score sums over head_dim in order, without a reduction across lanes.
    template <typename T>
    static void key_scores(KvRing ring, const Query *queries, int count, float scale, int begin, int end, float *scores) {
        if (count > V::kQueries / 2) key_scores_of<T, V::kQueries>(ring, queries, count, scale, begin, end, scores);
        else if (count > 1) key_scores_of<T, V::kQueries / 2>(ring, queries, count, scale, begin, end, scores);
        else key_scores_of<T, 1>(ring, queries, count, scale, begin, end, scores);
    }

    template <typename T, int Q>
    static void key_scores_of(KvRing ring, const Query *queries, int count, float scale, int begin, int end, float *scores) {
        const float *q[Q];
        for (int i = 0; i < Q; ++i) q[i] = queries[smaller(i, count - 1)].q;  // the last one stands in for those that lack
        int d = ring.layout.head_dim, stride = (end - begin) * kPanel;
        for (int b = begin; b < end; ++b) {
            const uint8_t *keys = block_of(ring, b * kPanel);
            V sums[Q];
#pragma GCC unroll 8
            for (int i = 0; i < Q; ++i) sums[i] = V::zero();
            for (int j = 0; j < d; ++j) {
                V key = T::load(keys + T::size * 16 * j);
#pragma GCC unroll 8
                for (int i = 0; i < Q; ++i) sums[i] = V::fma(V::set(q[i][j]), key, sums[i]);
            }
            float *out = scores + (b - begin) * kPanel;
#pragma GCC unroll 8
            for (int i = 0; i < Q; ++i) {
                if (i < count) V::store(out + i * stride, sums[i] * V::set(scale));
            }
        }
    }

    // Queries are quantized as activations are; dot products are exact integers.
    static void int8_scores(KvRing ring, const Query *queries, int count, float scale, int begin, int end, float *scores) {
        int8_t codes[V::kQueries][kMaxHeadDim];
        float scales[V::kQueries];
        int32_t unused[kMaxHeadDim / kGroup];
        const KvLayout &layout = ring.layout;
        int stride = (end - begin) * kPanel;
        for (int i = 0; i < count; ++i) {
            quantize_row(queries[i].q, layout.head_dim, codes[i], scales + i, unused);
            scales[i] *= scale;
        }
        for (int b = begin; b < end; ++b) {
            const uint8_t *block = block_of(ring, b * kPanel);
            V key_scales = V::load(reinterpret_cast<const float *>(block + layout.key_scales()));
            for (int i = 0; i < count; ++i) {
                V dot = V::dot_int8(reinterpret_cast<const int8_t *>(block), codes[i], layout.head_dim);
                V::store(scores + i * stride + (b - begin) * kPanel, dot * key_scales * V::set(scales[i]));
            }
        }
    }

    // exp(score - max) in place, 0 outside [hidden, seen); returns their sum.
    static float softmax_numerators(float *scores, int hidden, int seen, int padded) {
        for (int j = 0; j < hidden; ++j) scores[j] = -1e30f;
        for (int j = seen; j < padded; ++j) scores[j] = -1e30f;
        V largest = V::load(scores);
        for (int j = 16; j < padded; j += 16) largest = V::larger(largest, V::load(scores + j));
        V shift = V::set(V::top(largest)), sum = V::zero();
        for (int j = 0; j < padded; j += 16) {
            V p = exponential(V::load(scores + j) - shift);
            V::store(scores + j, p);
            sum = sum + p;
        }
        // The exponential of what is not seen is about 1e-38, not 0: it must not count.
        for (int j = 0; j < hidden; ++j) scores[j] = 0.0f;
        for (int j = seen; j < padded; ++j) scores[j] = 0.0f;
        return V::sum(sum);
    }

    // A lane is a channel. Tokens add up in order, so a longer tile gives a query the same bits as a shorter one.
    template <typename T>
    static void weigh_values(KvRing ring, const Query *queries, int count, int begin, int end, float *scores, const float *sums) {
        const KvLayout &layout = ring.layout;
        int stride = (end - begin) * kPanel;
        if (layout.type == PF_KV_INT8) {
            for (int b = begin; b < end; ++b) {
                V scales = V::load(reinterpret_cast<const float *>(block_of(ring, b * kPanel) + layout.value_scales()));
                for (int i = 0; i < count; ++i) {
                    float *p = scores + i * stride + (b - begin) * kPanel;
                    V::store(p, V::load(p) * scales);
                }
            }
        }
        if (count > V::kQueries / 2) add_values<T, V::kQueries>(ring, queries, count, begin, end, scores, sums);
        else if (count > 1) add_values<T, V::kQueries / 2>(ring, queries, count, begin, end, scores, sums);
        else add_values<T, 1>(ring, queries, count, begin, end, scores, sums);
    }

    template <typename T, int Q>
    static void add_values(KvRing ring, const Query *queries, int count, int begin, int end, const float *scores, const float *sums) {
        const KvLayout &layout = ring.layout;
        int d = layout.head_dim, stride = (end - begin) * kPanel;
        const float *p[Q];
        for (int i = 0; i < Q; ++i) p[i] = scores + smaller(i, count - 1) * stride;
        for (int c = 0; c < d; c += 32) {
            V low[Q], high[Q];
#pragma GCC unroll 8
            for (int i = 0; i < Q; ++i) low[i] = high[i] = V::zero();
            for (int b = begin; b < end; ++b) {
                const uint8_t *values = block_of(ring, b * kPanel) + layout.values() + T::size * size_t(c);
                int at = (b - begin) * kPanel;
                for (int j = 0; j < kPanel; ++j, values += T::size * size_t(d)) {
                    V v0 = T::load(values), v1 = T::load(values + T::size * 16);
#pragma GCC unroll 8
                    for (int i = 0; i < Q; ++i) {
                        V weight = V::set(p[i][at + j]);
                        low[i] = V::fma(weight, v0, low[i]);
                        high[i] = V::fma(weight, v1, high[i]);
                    }
                }
            }
#pragma GCC unroll 8
            for (int i = 0; i < Q; ++i) {
                if (i >= count) continue;
                V total = V::set(sums[i]);
                V::store(queries[i].out + c, low[i] / total);
                V::store(queries[i].out + c + 16, high[i] / total);
            }
        }
    }
};

} // namespace
} // namespace pf
