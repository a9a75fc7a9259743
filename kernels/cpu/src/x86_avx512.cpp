// AVX-512 with VNNI: one register is a panel's 16 rows.
#include "attention.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace pf {
namespace {

struct Lanes {
    static constexpr int kQueries = 8;
    __m512 v;

    static Lanes load(const float *p) { return {_mm512_loadu_ps(p)}; }
    static Lanes set(float x) { return {_mm512_set1_ps(x)}; }
    static Lanes zero() { return {_mm512_setzero_ps()}; }
    static void store(float *p, Lanes a) { _mm512_storeu_ps(p, a.v); }
    static Lanes load_half(const uint16_t *p) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)))};
    }
    static void store_half(uint16_t *p, Lanes a) {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static Lanes load_int8(const int8_t *p) {
        return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))))};
    }
    static void store_int8(int8_t *p, Lanes a) {
        _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
    }
    friend Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
    friend Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
    friend Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
    friend Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
    static Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    static Lanes larger(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
    static Lanes smaller(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
    static Lanes abs(Lanes a) { return {_mm512_abs_ps(a.v)}; }
    static Lanes nearest(Lanes a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
    static Lanes power_of_two(Lanes a) {
        __m512i bits = _mm512_add_epi32(_mm512_cvtps_epi32(a.v), _mm512_set1_epi32(127));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 23))};
    }
    static float sum(Lanes a) {
        __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
        __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
        c = _mm_add_ps(c, _mm_movehl_ps(c, c));
        return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
    }
    static float top(Lanes a) { return _mm512_reduce_max_ps(a.v); }
    using Sum = __m512i;
    static Sum no_sum() { return _mm512_setzero_si512(); }
    static Sum add_line(Sum sum, const uint8_t *p) { return _mm512_add_epi64(sum, _mm512_loadu_si512(p)); }
    static uint64_t all(Sum sum) {  // not by _mm512_reduce_add_epi64, which adds signed numbers: they may overflow
        uint64_t words[8], total = 0;
        memcpy(words, &sum, 64);
        for (uint64_t word : words) total += word;
        return total;
    }
    static int32_t sum_codes(const int8_t *codes) {
        __m256i biased = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(codes)), _mm256_set1_epi8(-128));
        __m256i sums = _mm256_sad_epu8(biased, _mm256_setzero_si256());
        __m128i half = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        return int32_t(_mm_cvtsi128_si64(half) + _mm_extract_epi64(half, 1)) - 128 * kGroup;
    }
    // Q dot products with a block's 16 keys. The instruction wants one side unsigned: keys + 128, and 128 * sum(q) taken away.
    template <int Q>
    static void dot_int8(const int8_t *keys, const int8_t *const *q, const int32_t *sums, int head_dim, Lanes *dots) {
        __m512i acc[Q], bias = _mm512_set1_epi8(-128);
#pragma GCC unroll 8
        for (int t = 0; t < Q; ++t) acc[t] = _mm512_set1_epi32(-128 * sums[t]);
        for (int i = 0; i < head_dim; i += 4) {
            __m512i key = _mm512_xor_si512(_mm512_loadu_si512(keys + i * kPanel), bias);
#pragma GCC unroll 8
            for (int t = 0; t < Q; ++t) {
                int32_t four;
                memcpy(&four, q[t] + i, 4);
                acc[t] = _mm512_dpbusd_epi32(acc[t], key, _mm512_set1_epi32(four));
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < Q; ++t) dots[t] = {_mm512_cvtepi32_ps(acc[t])};
    }
};

inline __m512i broadcast(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}

inline void store_rows(float *y, __m512 value, int rows) {
    if (rows >= kPanel) _mm512_storeu_ps(y, value);
    else _mm512_mask_storeu_ps(y, __mmask16((1u << rows) - 1), value);
}

constexpr int kTile = 12;

// T tokens by 16 rows: T integer and T float accumulators.
template <int T>
void int4_tile(const Matrix &w, const uint8_t *panel, const int8_t *x, const int32_t *offsets, const float *scales, float *y,
               size_t stride, int rows) {
    const uint8_t *codes = panel + w.scale_bytes();
    const __m512i low = _mm512_set1_epi8(15);
    __m512 total[T];
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) total[t] = _mm512_setzero_ps();
    for (int g = 0, groups = w.groups(); g < groups; ++g) {
        __m512i acc[T];
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) acc[t] = _mm512_set1_epi32(offsets[g * T + t]);
#pragma GCC unroll 4
        for (int b = 0; b < 4; ++b) {
            __m512i both = _mm512_loadu_si512(codes + b * 64);
            __m512i first = _mm512_and_si512(both, low), second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
#pragma GCC unroll 12
            for (int t = 0; t < T; ++t) acc[t] = _mm512_dpbusd_epi32(acc[t], first, broadcast(x + (b * 2 * T + t) * 4));
#pragma GCC unroll 12
            for (int t = 0; t < T; ++t) acc[t] = _mm512_dpbusd_epi32(acc[t], second, broadcast(x + ((b * 2 + 1) * T + t) * 4));
        }
        __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(panel + g * 32)));
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[t]), scale, total[t]);
        codes += 256;
        x += size_t(kGroup) * T;
    }
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) store_rows(y + size_t(t) * stride, _mm512_mul_ps(total[t], _mm512_set1_ps(scales[t])), rows);
}

// One token and S panels that lie apart: memory sets the pace, and one core reads several streams faster than one. The lines of
// kAhead bytes further on are asked for, into the second cache: the first has too few requests in flight.
constexpr int kStreams = 4, kAhead = 4096;

template <int S>
void int4_vector(const Matrix &w, int first, int step, const Rows &x, float *y) {
    const uint8_t *scales[S], *codes[S];
    __m512 total[S];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
        scales[s] = w.panel(first + s * step);
        codes[s] = scales[s] + w.scale_bytes();
        total[s] = _mm512_setzero_ps();
    }
    const __m512i low = _mm512_set1_epi8(15);
    const int8_t *four = x.codes;
    for (int g = 0, groups = w.groups(); g < groups; ++g) {
        __m512i acc[S];
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) acc[s] = _mm512_set1_epi32(x.offsets[g]);
#pragma GCC unroll 4
        for (int b = 0; b < 4; ++b) {
            __m512i x0 = broadcast(four + b * 8), x1 = broadcast(four + b * 8 + 4);
#pragma GCC unroll 4
            for (int s = 0; s < S; ++s) {
                const uint8_t *at = codes[s] + size_t(g) * 256 + b * 64;
                _mm_prefetch(reinterpret_cast<const char *>(at + kAhead), _MM_HINT_T1);
                __m512i both = _mm512_loadu_si512(at);
                acc[s] = _mm512_dpbusd_epi32(acc[s], _mm512_and_si512(both, low), x0);
                acc[s] = _mm512_dpbusd_epi32(acc[s], _mm512_and_si512(_mm512_srli_epi16(both, 4), low), x1);
            }
        }
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) {
            __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(scales[s] + g * 32)));
            total[s] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[s]), scale, total[s]);
        }
        four += kGroup;
    }
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
        int panel = first + s * step;
        store_rows(y + size_t(panel) * kPanel, _mm512_mul_ps(total[s], _mm512_set1_ps(x.scales[0])), w.rows - panel * kPanel);
    }
}

void int4_vector_all(const Matrix &w, const Rows &x, int begin, int end, float *y) {
    int step = (end - begin) / kStreams;
    for (int p = begin; p < begin + step; ++p) int4_vector<kStreams>(w, p, step, x, y);
    for (int p = begin + step * kStreams; p < end; ++p) int4_vector<1>(w, p, 0, x, y);
}

template <int T>
void int8_tile(const Matrix &w, const uint8_t *panel, const int8_t *x, const int32_t *offsets, const float *scales, float *y,
               size_t stride, int rows) {
    const uint8_t *codes = panel + w.scale_bytes();
    const __m512i bias = _mm512_set1_epi8(-128);
    __m512i acc[T];
    for (int t = 0; t < T; ++t) {
        int32_t offset = 0;
        for (int g = 0; g < w.groups(); ++g) offset += offsets[g * T + t];
        acc[t] = _mm512_set1_epi32(16 * offset);  // -128 * the sum of the row's codes
    }
    for (int i = 0; i < w.k / 4; ++i) {
        __m512i four = _mm512_xor_si512(_mm512_loadu_si512(codes + size_t(i) * 64), bias);
        if (T == 1) _mm_prefetch(reinterpret_cast<const char *>(codes + size_t(i) * 64 + 2048), _MM_HINT_T0);
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) acc[t] = _mm512_dpbusd_epi32(acc[t], four, broadcast(x + (size_t(i) * T + t) * 4));
    }
    __m512 row_scales = _mm512_loadu_ps(panel);
    for (int t = 0; t < T; ++t) {
        __m512 value = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(acc[t]), row_scales), _mm512_set1_ps(scales[t]));
        store_rows(y + size_t(t) * stride, value, rows);
    }
}

template <int T>
void tile(const Matrix &w, const uint8_t *panel, const int8_t *x, const int32_t *offsets, const float *scales, float *y,
          size_t stride, int rows) {
    (w.encoding == Matrix::kInt4 ? int4_tile<T> : int8_tile<T>)(w, panel, x, offsets, scales, y, stride, rows);
}

using Tile = void (*)(const Matrix &, const uint8_t *, const int8_t *, const int32_t *, const float *, float *, size_t, int);
constexpr Tile kTiles[kTile] = {tile<1>, tile<2>, tile<3>, tile<4>,  tile<5>,  tile<6>,
                                tile<7>, tile<8>, tile<9>, tile<10>, tile<11>, tile<12>};

void multiply(const Matrix &w, const Rows &x, int begin, int end, float *y, size_t stride) {
    if (x.count == 1 && w.encoding == Matrix::kInt4) {
        int4_vector_all(w, x, begin, end, y);
        return;
    }
    int tile = tile_rows(x.count, kTile);
    for (int p = begin; p < end; ++p) {
        const uint8_t *panel = w.panel(p);
        float *out = y + size_t(p) * kPanel;
        int rows = smaller(kPanel, w.rows - p * kPanel);
        for (int t = 0; t < x.count; t += tile) {
            int count = smaller(tile, x.count - t);
            const int8_t *codes = x.count == 1 ? x.codes : x.packed + size_t(t) * size_t(x.k);
            const int32_t *offsets = x.count == 1 ? x.offsets : x.packed_offsets + size_t(t) * size_t(w.groups());
            kTiles[count - 1](w, panel, codes, offsets, x.scales + t, out + size_t(t) * stride, stride, rows);
        }
    }
}

void pack(Rows &x, int first, int last) { pack_tiles(x, kTile, first, last); }

int64_t burn(int64_t rounds) {
    __m512i x = _mm512_set1_epi32(0x01020304), a = x, b = x, c = x, d = x, e = x, f = x, g = x, h = x;
    for (int64_t i = 0; i < rounds; ++i) {
        a = _mm512_dpbusd_epi32(a, x, x);
        b = _mm512_dpbusd_epi32(b, x, x);
        c = _mm512_dpbusd_epi32(c, x, x);
        d = _mm512_dpbusd_epi32(d, x, x);
        e = _mm512_dpbusd_epi32(e, x, x);
        f = _mm512_dpbusd_epi32(f, x, x);
        g = _mm512_dpbusd_epi32(g, x, x);
        h = _mm512_dpbusd_epi32(h, x, x);
        asm volatile("" : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f), "+v"(g), "+v"(h));  // every one counts
    }
    return rounds * 8 * 64;
}

bool supported() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

} // namespace

using F = FloatOps<Lanes>;
using A = AttentionOps<Lanes>;
const Ops kAvx512Ops = {"avx512vnni", supported, multiply,    pack,      F::quantize_row, F::rms_norm,
                        F::rope,      F::swiglu, F::add, A::store_kv, A::attend,       F::log_sum_exp,
                       F::exponentials, F::router, F::add_scaled, burn, F::read};

} // namespace pf
#endif
