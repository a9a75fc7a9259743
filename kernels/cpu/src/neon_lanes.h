// Sixteen floats on 64-bit Arm: four registers. All of it is in the first version of the architecture, but for dot_int8.
#pragma once

#include <arm_neon.h>

#include "attention.h"

// Compiled for one function and not for the file: whatever else the compiler emits here runs on every 64-bit Arm CPU.
#define PF_DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#define PF_I8MM __attribute__((target("arch=armv8.2-a+dotprod+i8mm")))

namespace pf {
namespace {

struct Lanes {
    // Two: the values' accumulators are 8 registers a query, and the values themselves 8 more, of 32.
    static constexpr int kQueries = 2;
    float32x4_t v[4];

    template <typename F> static Lanes each(F f) { return {{f(0), f(1), f(2), f(3)}}; }
    static Lanes load(const float *p) { return each([&](int i) { return vld1q_f32(p + 4 * i); }); }
    static Lanes set(float x) { return each([&](int) { return vdupq_n_f32(x); }); }
    static Lanes zero() { return set(0.0f); }
    static void store(float *p, Lanes a) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
    }
    static float32x4_t half4(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
    static Lanes load_half(const uint16_t *p) { return each([&](int i) { return half4(p + 4 * i); }); }
    static void store_half(uint16_t *p, Lanes a) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
    }
    static Lanes load_int8(const int8_t *p) {
        int8x16_t codes = vld1q_s8(p);
        int16x8_t low = vmovl_s8(vget_low_s8(codes)), high = vmovl_high_s8(codes);
        return from_int32(vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high));
    }
    static Lanes from_int32(int32x4_t a, int32x4_t b, int32x4_t c, int32x4_t d) {
        return {{vcvtq_f32_s32(a), vcvtq_f32_s32(b), vcvtq_f32_s32(c), vcvtq_f32_s32(d)}};
    }
    // Of whole numbers in [-128, 127]: the even bytes and halves are all that they have.
    static void store_int8(int8_t *p, Lanes a) {
        auto words = [&](int i) { return vreinterpretq_s16_s32(vcvtq_s32_f32(a.v[i])); };
        int16x8_t low = vuzp1q_s16(words(0), words(1)), high = vuzp1q_s16(words(2), words(3));
        vst1q_s8(p, vuzp1q_s8(vreinterpretq_s8_s16(low), vreinterpretq_s8_s16(high)));
    }
    friend Lanes operator+(Lanes a, Lanes b) { return each([&](int i) { return vaddq_f32(a.v[i], b.v[i]); }); }
    friend Lanes operator-(Lanes a, Lanes b) { return each([&](int i) { return vsubq_f32(a.v[i], b.v[i]); }); }
    friend Lanes operator*(Lanes a, Lanes b) { return each([&](int i) { return vmulq_f32(a.v[i], b.v[i]); }); }
    friend Lanes operator/(Lanes a, Lanes b) { return each([&](int i) { return vdivq_f32(a.v[i], b.v[i]); }); }
    static Lanes fma(Lanes a, Lanes b, Lanes c) { return each([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); }); }
    // As a > b ? a : b, but for NaN and for the sign of a zero, neither of which reaches a result.
    static Lanes larger(Lanes a, Lanes b) { return each([&](int i) { return vmaxq_f32(a.v[i], b.v[i]); }); }
    static Lanes smaller(Lanes a, Lanes b) { return each([&](int i) { return vminq_f32(a.v[i], b.v[i]); }); }
    static Lanes abs(Lanes a) { return each([&](int i) { return vabsq_f32(a.v[i]); }); }
    static Lanes nearest(Lanes a) { return each([&](int i) { return vrndnq_f32(a.v[i]); }); }
    static Lanes power_of_two(Lanes a) {
        return each([&](int i) {
            int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(a.v[i]), vdupq_n_s32(127));
            return vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23));
        });
    }
    static float sum(Lanes a) {
        float32x4_t four = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
        return vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
    }
    static float top(Lanes a) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3]))); }
    using Sum = uint64x2_t;
    static Sum no_sum() { return vdupq_n_u64(0); }
    static Sum add_line(Sum sum, const uint8_t *p) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sum = vaddq_u64(sum, vreinterpretq_u64_u8(vld1q_u8(p + 16 * i)));
        return sum;
    }
    static uint64_t all(Sum sum) { return vaddvq_u64(sum); }
    static int32_t sum_codes(const int8_t *codes) { return vaddlvq_s8(vld1q_s8(codes)) + vaddlvq_s8(vld1q_s8(codes + 16)); }

    template <int Q>
    PF_DOTPROD static void dot_int8(const int8_t *keys, const int8_t *const *q, const int32_t *, int head_dim, Lanes *dots) {
        int32x4_t acc[Q][4];
#pragma GCC unroll 2
        for (int t = 0; t < Q; ++t) acc[t][0] = acc[t][1] = acc[t][2] = acc[t][3] = vdupq_n_s32(0);
        for (int i = 0; i < head_dim; i += 16, keys += 256) {
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
                int8x16_t k0 = vld1q_s8(keys + 16 * r), k1 = vld1q_s8(keys + 16 * r + 64);
                int8x16_t k2 = vld1q_s8(keys + 16 * r + 128), k3 = vld1q_s8(keys + 16 * r + 192);
#pragma GCC unroll 2
                for (int t = 0; t < Q; ++t) {
                    int8x16_t x = vld1q_s8(q[t] + i);
                    acc[t][r] = vdotq_laneq_s32(acc[t][r], k0, x, 0);
                    acc[t][r] = vdotq_laneq_s32(acc[t][r], k1, x, 1);
                    acc[t][r] = vdotq_laneq_s32(acc[t][r], k2, x, 2);
                    acc[t][r] = vdotq_laneq_s32(acc[t][r], k3, x, 3);
                }
            }
        }
#pragma GCC unroll 2
        for (int t = 0; t < Q; ++t) dots[t] = from_int32(acc[t][0], acc[t][1], acc[t][2], acc[t][3]);
    }
};

// ---- what the products of both variants share -------------------------------------------------------------------

inline int8x16_t low_nibbles(uint8x16_t both) { return vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15))); }
inline int8x16_t high_nibbles(uint8x16_t both) { return vreinterpretq_s8_u8(vshrq_n_u8(both, 4)); }

inline void store_rows(float *y, float32x4_t value, int rows) {
    if (rows >= 4) {
        vst1q_f32(y, value);
    } else if (rows > 0) {
        float all[4];
        vst1q_f32(all, value);
        memcpy(y, all, size_t(rows) * sizeof(float));
    }
}

// Computes tokens first.. of x by the panel's rows `row`, `row` + 1 .. `rows`: how many of them there are.
using Tile = void (*)(const Matrix &w, const uint8_t *panel, int row, const Rows &x, int first, float *y, size_t stride, int rows);

struct TileShape {
    Tile run;
    int rows;  // at once
};

// kernels[T - 1] takes T tokens, up to kTokens. Panels outside, so that one stays in the first cache for all tokens.
template <int kTokens>
void multiply_tiles(const TileShape (&kernels)[kTokens], const Matrix &w, const Rows &x, int begin, int end, float *y, size_t stride) {
    int most = tile_rows(x.count, kTokens);
    for (int p = begin; p < end; ++p) {
        for (int t = 0; t < x.count; t += most) {
            TileShape tile = kernels[smaller(most, x.count - t) - 1];
            for (int at = p * kPanel; at < smaller((p + 1) * kPanel, w.rows); at += tile.rows) {
                tile.run(w, w.panel(p), at % kPanel, x, t, y + at + size_t(t) * stride, stride, w.rows - at);
            }
        }
    }
}

} // namespace
} // namespace pf
