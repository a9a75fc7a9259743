// Attention of every variant, over the same vectors as float_ops.h: keys and values in blocks of 16 tokens (ops.h).
#pragma once

#include "float_ops.h"

namespace pf {
namespace {

template <typename V> struct AttentionOps {
    using Floats = FloatOps<V>;

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
            Floats::quantize_row(key, d, codes, reinterpret_cast<float *>(block + layout.key_scales()) + lane, unused);
            for (int i = 0; i < d; ++i) block[(i / 4 * kPanel + lane) * 4 + i % 4] = uint8_t(codes[i]);
            int8_t *values = reinterpret_cast<int8_t *>(block + layout.values()) + lane * d;
            Floats::quantize_row(value, d, values, reinterpret_cast<float *>(block + layout.value_scales()) + lane, unused);
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
            Floats::quantize_row(queries[i].q, layout.head_dim, codes[i], scales + i, unused);
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
