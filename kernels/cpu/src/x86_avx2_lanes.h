// Sixteen floats as two AVX2 registers.
#pragma once

#include "attention.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace pf {
namespace {

struct Lanes {
    static constexpr int kQueries = 4;
    __m256 a, b;

    static Lanes load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static Lanes set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static void store(float *p, Lanes x) {
        _mm256_storeu_ps(p, x.a);
        _mm256_storeu_ps(p + 8, x.b);
    }
    static __m128i load16(const void *p) { return _mm_loadu_si128(static_cast<const __m128i *>(p)); }
    static Lanes load_half(const uint16_t *p) { return {_mm256_cvtph_ps(load16(p)), _mm256_cvtph_ps(load16(p + 8))}; }
    static void store_half(uint16_t *p, Lanes x) {
        constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_cvtps_ph(x.a, kNearest));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(p + 8), _mm256_cvtps_ph(x.b, kNearest));
    }
    static Lanes load_int8(const int8_t *p) {
        __m128i codes = load16(p);
        return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(codes, 8)))};
    }
    static void store_int8(int8_t *p, Lanes x) {
        __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
        words = _mm256_permute4x64_epi64(words, 0xd8);
        __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(p), bytes);
    }
    friend Lanes operator+(Lanes x, Lanes y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
    friend Lanes operator-(Lanes x, Lanes y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
    friend Lanes operator*(Lanes x, Lanes y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
    friend Lanes operator/(Lanes x, Lanes y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
    static Lanes fma(Lanes x, Lanes y, Lanes z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
    static Lanes larger(Lanes x, Lanes y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
    static Lanes smaller(Lanes x, Lanes y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
    static Lanes abs(Lanes x) {
        __m256 sign = _mm256_set1_ps(-0.0f);
        return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
    }
    static Lanes nearest(Lanes x) {
        constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        return {_mm256_round_ps(x.a, kNearest), _mm256_round_ps(x.b, kNearest)};
    }
    static Lanes power_of_two(Lanes x) {
        __m256i bias = _mm256_set1_epi32(127);
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(x.a), bias), 23)),
                _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(x.b), bias), 23))};
    }
    static float sum(Lanes x) {
        __m256 eight = _mm256_add_ps(x.a, x.b);
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        four = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
    }
    static float top(Lanes x) {
        __m256 eight = _mm256_max_ps(x.a, x.b);
        __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        four = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
    }
    using Sum = __m256i;
    static Sum no_sum() { return _mm256_setzero_si256(); }
    static Sum add_line(Sum sum, const uint8_t *p) {
        const __m256i *line = reinterpret_cast<const __m256i *>(p);
        return _mm256_add_epi64(sum, _mm256_add_epi64(_mm256_loadu_si256(line), _mm256_loadu_si256(line + 1)));
    }
    static uint64_t all(Sum sum) {
        uint64_t words[4];
        memcpy(words, &sum, 32);
        return words[0] + words[1] + words[2] + words[3];
    }
    static int32_t sum_codes(const int8_t *codes) {
        __m256i biased = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(codes)), _mm256_set1_epi8(-128));
        __m256i sums = _mm256_sad_epu8(biased, _mm256_setzero_si256());
        __m128i half = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        return int32_t(_mm_cvtsi128_si64(half) + _mm_extract_epi64(half, 1)) - 128 * kGroup;
    }
    template <int Q>
    static void dot_int8(const int8_t *keys, const int8_t *const *q, const int32_t *sums, int head_dim, Lanes *dots);
};

} // namespace
} // namespace pf
#endif
