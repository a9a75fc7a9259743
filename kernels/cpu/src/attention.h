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

    // A pass over the cache takes half of every block and leaps the other: more than the hardware foresees, and reading
    // falls to a quarter of the bandwidth. So with few queries, when memory sets the pace, each pass asks for its half of
    // a block some blocks ahead.
    // Inlined always: GCC takes a function that does nothing else for one without effect, and leaves its calls out.
    __attribute__((always_inline)) static void ask_for(KvRing ring, int block, int end, size_t offset) {
        if (!ring.ahead || block + kAhead >= end) return;
        const uint8_t *ahead = block_of(ring, (block + kAhead) * kPanel) + offset;
        for (size_t i = 0; i < ring.layout.key_bytes() + ring.layout.scale_bytes(); i += 64) __builtin_prefetch(ahead + i, 0, 2);
    }
    static constexpr int kAhead = 4;

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
        ring.ahead = count < kQueryTile;
        int first = queries[0].first, last = queries[0].last;
        for (int i = 1; i < count; ++i) {
            first = smaller(first, queries[i].first);
            last = larger(last, queries[i].last);
        }
        int begin = first / kPanel, end = last / kPanel + 1, stride = (end - begin) * kPanel;
        in_tiles(count, [&](auto size, int i) {
            constexpr int Q = decltype(size)::value;
            float *out = scores + i * stride;
            if (ring.layout.type == PF_KV_INT8) int8_scores<Q>(ring, queries + i, scale, begin, end, out);
            else if (ring.layout.type == PF_KV_F16) key_scores<Float16, Q>(ring, queries + i, scale, begin, end, out);
            else key_scores<Float32, Q>(ring, queries + i, scale, begin, end, out);
        });
        float sums[kQueryTile];
        for (int i = 0; i < count; ++i) {
            int hidden = queries[i].first - begin * kPanel, seen = queries[i].last - begin * kPanel + 1;
            sums[i] = softmax_numerators(scores + i * stride, hidden, seen, stride);
        }
        if (ring.layout.type == PF_KV_INT8) scale_weights(ring, count, begin, end, scores);
        in_tiles(count, [&](auto size, int i) {
            constexpr int Q = decltype(size)::value;
            float *p = scores + i * stride;
            if (ring.layout.type == PF_KV_INT8) weigh_values<Int8, Q>(ring, queries + i, begin, end, p, sums + i);
            else if (ring.layout.type == PF_KV_F16) weigh_values<Float16, Q>(ring, queries + i, begin, end, p, sums + i);
            else weigh_values<Float32, Q>(ring, queries + i, begin, end, p, sums + i);
        });
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

    // f(size, first): as many full tiles as there are, and what is left in one of its own size; Q is a constant in f.
    template <typename F> static void in_tiles(int count, F f) {
        int i = 0;
        for (; count - i >= V::kQueries; i += V::kQueries) f(Size<V::kQueries>(), i);
        if (i < count) rest<V::kQueries - 1>(count - i, [&](auto size) { f(size, i); });
    }
    template <int Q, typename F> static void rest(int count, F f) {
        if constexpr (Q > 1) {
            if (count < Q) return rest<Q - 1>(count, f);
        }
        f(Size<Q>());
    }
    template <int Q> struct Size {
        static constexpr int value = Q;
    };

    // A lane is a token: each score sums over head_dim in order, without a reduction across lanes.
    template <typename T, int Q>
    static void key_scores(KvRing ring, const Query *queries, float scale, int begin, int end, float *scores) {
        const float *q[Q];
        for (int i = 0; i < Q; ++i) q[i] = queries[i].q;
        int d = ring.layout.head_dim, stride = (end - begin) * kPanel;
        for (int b = begin; b < end; ++b) {
            ask_for(ring, b, end, 0);
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
            for (int i = 0; i < Q; ++i) V::store(out + i * stride, sums[i] * V::set(scale));
        }
    }

    // Queries are quantized as activations are; dot products are exact integers.
    template <int Q>
    static void int8_scores(KvRing ring, const Query *queries, float scale, int begin, int end, float *scores) {
        int8_t codes[Q][kMaxHeadDim];
        const int8_t *q[Q];
        int32_t sums[Q];
        float scales[Q];
        const KvLayout &layout = ring.layout;
        int stride = (end - begin) * kPanel;
        for (int i = 0; i < Q; ++i) {
            int32_t offsets[kMaxHeadDim / kGroup];
            Floats::quantize_row(queries[i].q, layout.head_dim, codes[i], scales + i, offsets);
            scales[i] *= scale;
            q[i] = codes[i];
            sums[i] = 0;
            for (int g = 0; g < layout.head_dim / kGroup; ++g) sums[i] -= offsets[g] / 8;
        }
        for (int b = begin; b < end; ++b) {
            ask_for(ring, b, end, 0);
            const uint8_t *block = block_of(ring, b * kPanel);
            __builtin_prefetch(block + layout.value_scales(), 0, 2);  // for scale_weights
            V key_scales = V::load(reinterpret_cast<const float *>(block + layout.key_scales())), dots[Q];
            V::template dot_int8<Q>(reinterpret_cast<const int8_t *>(block), q, sums, layout.head_dim, dots);
            float *out = scores + (b - begin) * kPanel;
#pragma GCC unroll 8
            for (int i = 0; i < Q; ++i) V::store(out + i * stride, dots[i] * key_scales * V::set(scales[i]));
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

    // A token's weight times its values' scale, so that the codes are all that is left to weigh.
    static void scale_weights(KvRing ring, int count, int begin, int end, float *scores) {
        int stride = (end - begin) * kPanel;
        for (int b = begin; b < end; ++b) {
            V scales = V::load(reinterpret_cast<const float *>(block_of(ring, b * kPanel) + ring.layout.value_scales()));
            for (int i = 0; i < count; ++i) {
                float *p = scores + i * stride + (b - begin) * kPanel;
                V::store(p, V::load(p) * scales);
            }
        }
    }

    template <typename T, int Q>
    static void weigh_values(KvRing ring, const Query *queries, int begin, int end, const float *scores, const float *sums) {
        int c = 0, d = ring.layout.head_dim;
        // Whole lines of a narrow cache where the registers hold them: the cache is then read once.
        if constexpr (V::kQueries == 8 && Q <= 6) {
            for (; c + 64 <= d; c += 64) add_values<T, Q, 4>(ring, queries, begin, end, c, scores, sums);
        }
        for (; c < d; c += 32) add_values<T, Q, 2>(ring, queries, begin, end, c, scores, sums);
    }

    // 16 C channels from channel c. A lane is a channel. Tokens add up in order, so a longer tile gives a query the same
    // bits as a shorter one.
    template <typename T, int Q, int C>
    static void add_values(KvRing ring, const Query *queries, int begin, int end, int c, const float *scores, const float *sums) {
        const KvLayout &layout = ring.layout;
        int stride = (end - begin) * kPanel;
        size_t row = T::size * size_t(layout.head_dim);
        const float *p[Q];
        for (int i = 0; i < Q; ++i) p[i] = scores + i * stride;
        V total[Q][C];
#pragma GCC unroll 8
        for (int i = 0; i < Q; ++i) {
#pragma GCC unroll 4
            for (int k = 0; k < C; ++k) total[i][k] = V::zero();
        }
        for (int b = begin; b < end; ++b) {
            if (c == 0) ask_for(ring, b, end, layout.values());
            const uint8_t *values = block_of(ring, b * kPanel) + layout.values() + T::size * size_t(c);
            int at = (b - begin) * kPanel;
            for (int j = 0; j < kPanel; ++j, values += row) {
                V v[C];
#pragma GCC unroll 4
                for (int k = 0; k < C; ++k) v[k] = T::load(values + T::size * 16 * size_t(k));
#pragma GCC unroll 8
                for (int i = 0; i < Q; ++i) {
                    V weight = V::set(p[i][at + j]);
#pragma GCC unroll 4
                    for (int k = 0; k < C; ++k) total[i][k] = V::fma(weight, v[k], total[i][k]);
                }
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < Q; ++i) {
#pragma GCC unroll 4
            for (int k = 0; k < C; ++k) V::store(queries[i].out + c + 16 * k, total[i][k] / V::set(sums[i]));
        }
    }
};

} // namespace
} // namespace pf
