// AVX2 with FMA and F16C: a panel's 16 rows are two registers.
#include "x86_avx2_lanes.h"

#if defined(__x86_64__)
#include <cpuid.h>

namespace pf {
namespace {

inline __m256i load32(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }

inline __m256i broadcast(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}

// acc += the sums of four products of signed bytes. |a| as unsigned and b with a's sign give the same products; two of them
// reach 2 * 128 * 127 = 32,512 at most, which 16 bits hold.
inline __m256i add_dot(__m256i acc, __m256i a, __m256i b) {
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

template <int Q>
void Lanes::dot_int8(const int8_t *keys, const int8_t *const *q, const int32_t *, int head_dim, Lanes *dots) {
    __m256i a[Q], b[Q];
#pragma GCC unroll 4
    for (int t = 0; t < Q; ++t) a[t] = b[t] = _mm256_setzero_si256();
    for (int i = 0; i < head_dim; i += 4) {
        __m256i low = load32(keys + i * kPanel), high = load32(keys + i * kPanel + 32);
#pragma GCC unroll 4
        for (int t = 0; t < Q; ++t) {
            __m256i four = broadcast(q[t] + i);
            a[t] = add_dot(a[t], low, four);
            b[t] = add_dot(b[t], high, four);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < Q; ++t) dots[t] = {_mm256_cvtepi32_ps(a[t]), _mm256_cvtepi32_ps(b[t])};
}

inline void store_rows(float *y, __m256 value, int rows) {
    if (rows >= 8) {
        _mm256_storeu_ps(y, value);
    } else if (rows > 0) {
        float all[8];
        _mm256_storeu_ps(all, value);
        memcpy(y, all, size_t(rows) * sizeof(float));
    }
}

constexpr int kTile = 4;

// T tokens by 8 rows. Within a group products add up in 16 bits: 16 nibbles of 15 at most by 127 twice is 30,480 a lane.
template <int T>
void int4_half(const Matrix &w, const uint8_t *panel, int half, const int8_t *x, const int32_t *offsets, const float *scales,
               float *y, size_t stride, int rows) {
    const uint8_t *codes = panel + w.scale_bytes() + half * 32;
    const uint8_t *group_scales = panel + half * 16;
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256 total[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) total[t] = _mm256_setzero_ps();
    for (int g = 0, groups = w.groups(); g < groups; ++g) {
        __m256i pairs[T];
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) pairs[t] = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int b = 0; b < 4; ++b) {
            __m256i both = load32(codes + b * 64);
            __m256i first = _mm256_and_si256(both, low), second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
                pairs[t] = _mm256_add_epi16(pairs[t], _mm256_maddubs_epi16(first, broadcast(x + (b * 2 * T + t) * 4)));
                pairs[t] = _mm256_add_epi16(pairs[t], _mm256_maddubs_epi16(second, broadcast(x + ((b * 2 + 1) * T + t) * 4)));
            }
        }
        __m256 scale = _mm256_cvtph_ps(Lanes::load16(group_scales + g * 32));
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
            __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(pairs[t], ones), _mm256_set1_epi32(offsets[g * T + t]));
            total[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, total[t]);
        }
        codes += 256;
        x += size_t(kGroup) * T;
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) store_rows(y + size_t(t) * stride, _mm256_mul_ps(total[t], _mm256_set1_ps(scales[t])), rows);
}

// One token and S panels that lie apart, both halves of each: see x86_avx512.cpp.
constexpr int kStreams = 2, kAhead = 4096;

template <int S>
void int4_vector(const Matrix &w, int first, int step, const Rows &x, float *y) {
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const uint8_t *scales[S], *codes[S];
    __m256 total[S][2];
    for (int s = 0; s < S; ++s) {
        scales[s] = w.panel(first + s * step);
        codes[s] = scales[s] + w.scale_bytes();
        total[s][0] = total[s][1] = _mm256_setzero_ps();
    }
    for (int g = 0, groups = w.groups(); g < groups; ++g) {
        __m256i pairs[S][2];
#pragma GCC unroll 2
        for (int s = 0; s < S; ++s) pairs[s][0] = pairs[s][1] = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int b = 0; b < 4; ++b) {
            __m256i x0 = broadcast(x.codes + g * kGroup + b * 8), x1 = broadcast(x.codes + g * kGroup + b * 8 + 4);
#pragma GCC unroll 2
            for (int s = 0; s < S; ++s) {
                const uint8_t *at = codes[s] + size_t(g) * 256 + b * 64;
                _mm_prefetch(reinterpret_cast<const char *>(at + kAhead), _MM_HINT_T1);
#pragma GCC unroll 2
                for (int half = 0; half < 2; ++half) {
                    __m256i both = load32(at + half * 32);
                    __m256i products = _mm256_maddubs_epi16(_mm256_and_si256(both, low), x0);
                    pairs[s][half] = _mm256_add_epi16(pairs[s][half], products);
                    products = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(both, 4), low), x1);
                    pairs[s][half] = _mm256_add_epi16(pairs[s][half], products);
                }
            }
        }
        __m256i offset = _mm256_set1_epi32(x.offsets[g]);
#pragma GCC unroll 2
        for (int s = 0; s < S; ++s) {
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(pairs[s][half], ones), offset);
                __m256 scale = _mm256_cvtph_ps(Lanes::load16(scales[s] + g * 32 + half * 16));
                total[s][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, total[s][half]);
            }
        }
    }
    for (int s = 0; s < S; ++s) {
        for (int half = 0; half < 2; ++half) {
            int row = (first + s * step) * kPanel + half * 8;
            store_rows(y + row, _mm256_mul_ps(total[s][half], _mm256_set1_ps(x.scales[0])), w.rows - row);
        }
    }
}

template <int T>
void int8_half(const Matrix &w, const uint8_t *panel, int half, const int8_t *x, const float *scales, float *y, size_t stride,
               int rows) {
    const uint8_t *codes = panel + w.scale_bytes() + half * 32;
    __m256i acc[T];
    for (int t = 0; t < T; ++t) acc[t] = _mm256_setzero_si256();
    for (int i = 0; i < w.k / 4; ++i) {
        __m256i four = load32(codes + size_t(i) * 64);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) acc[t] = add_dot(acc[t], four, broadcast(x + (size_t(i) * T + t) * 4));
    }
    __m256 row_scales = _mm256_loadu_ps(reinterpret_cast<const float *>(panel) + half * 8);
    for (int t = 0; t < T; ++t) {
        __m256 value = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(acc[t]), row_scales), _mm256_set1_ps(scales[t]));
        store_rows(y + size_t(t) * stride, value, rows);
    }
}

template <int T>
void tile(const Matrix &w, const uint8_t *panel, const int8_t *x, const int32_t *offsets, const float *scales, float *y,
          size_t stride, int rows) {
    for (int half = 0; half < 2; ++half) {
        int part = rows - half * 8;
        if (w.encoding == Matrix::kInt4) int4_half<T>(w, panel, half, x, offsets, scales, y + half * 8, stride, part);
        else int8_half<T>(w, panel, half, x, scales, y + half * 8, stride, part);
    }
}

using Tile = void (*)(const Matrix &, const uint8_t *, const int8_t *, const int32_t *, const float *, float *, size_t, int);
constexpr Tile kTiles[kTile] = {tile<1>, tile<2>, tile<3>, tile<4>};

void multiply(const Matrix &w, const Rows &x, int begin, int end, float *y, size_t stride) {
    if (x.count == 1 && w.encoding == Matrix::kInt4) {
        int step = (end - begin) / kStreams;
        for (int p = begin; p < begin + step; ++p) int4_vector<kStreams>(w, p, step, x, y);
        for (int p = begin + step * kStreams; p < end; ++p) int4_vector<1>(w, p, 0, x, y);
        return;
    }
    int tile = tile_rows(x.count, kTile);
    for (int p = begin; p < end; ++p) {
        for (int t = 0; t < x.count; t += tile) {
            int count = smaller(tile, x.count - t);
            const int8_t *codes = x.count == 1 ? x.codes : x.packed + size_t(t) * size_t(x.k);
            const int32_t *offsets = x.count == 1 ? x.offsets : x.packed_offsets + size_t(t) * size_t(w.groups());
            kTiles[count - 1](w, w.panel(p), codes, offsets, x.scales + t, y + size_t(p) * kPanel + size_t(t) * stride, stride,
                              smaller(kPanel, w.rows - p * kPanel));
        }
    }
}

void pack(Rows &x, int first, int last) { pack_tiles(x, kTile, first, last); }

int64_t burn(int64_t rounds) {
    // As in a tile: the products of a group of 32 add up in 16 bits, so widening is left out here.
    __m256i x = _mm256_set1_epi8(3), a = x, b = x, c = x, d = x, e = x, f = x;
    for (int64_t i = 0; i < rounds; ++i) {
        a = _mm256_add_epi16(a, _mm256_maddubs_epi16(x, a));
        b = _mm256_add_epi16(b, _mm256_maddubs_epi16(x, b));
        c = _mm256_add_epi16(c, _mm256_maddubs_epi16(x, c));
        d = _mm256_add_epi16(d, _mm256_maddubs_epi16(x, d));
        e = _mm256_add_epi16(e, _mm256_maddubs_epi16(x, e));
        f = _mm256_add_epi16(f, _mm256_maddubs_epi16(x, f));
        asm volatile("" : "+x"(a), "+x"(b), "+x"(c), "+x"(d), "+x"(e), "+x"(f), "+x"(x));  // every one counts
    }
    return rounds * 6 * 32;
}

bool supported() {
    unsigned a, b, c = 0, d;
    bool f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c >> 29 & 1) != 0;  // clang 14 has no name for it
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
}

} // namespace

using F = FloatOps<Lanes>;
using A = AttentionOps<Lanes>;
const Ops kAvx2Ops = {"avx2",  supported, multiply, pack,        F::quantize_row, F::rms_norm,
                      F::rope, F::swiglu, F::add,   A::store_kv, A::attend,       F::log_sum_exp,
                       F::exponentials, F::router, F::add_scaled, burn, F::read};

} // namespace pf
#endif
