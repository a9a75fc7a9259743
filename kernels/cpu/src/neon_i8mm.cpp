// 64-bit Arm with `smmla`, 2 x 8 by 8 x 2 bytes at once: phones since about 2021. One token alone runs as without it.
#include "neon_lanes.h"

#if defined(__aarch64__)
#include <sys/auxv.h>

namespace pf {
namespace {

// Tiles of 4 tokens, the last one of what is left: [k / 8][tokens of the tile][8]. The instruction sums over 8 columns in
// whatever order both operands have them. Of each 16 columns the first eight here are 0-3 and 8-11 and the others 4-7 and 12-15,
// for then the weights need one `zip` a register, before their nibbles are taken apart.
void pack(Rows &x, int first, int last) {
    first = (first + kTile - 1) / kTile * kTile;
    for (int groups = x.k / kGroup; first < last; first += kTile) {
        int rows = smaller(kTile, x.count - first);
        int8_t *to = x.packed + size_t(first) * size_t(x.k);
        for (int r = 0; r < rows; ++r) {
            const int8_t *from = x.codes + size_t(first + r) * size_t(x.k);
            for (int i = 0; i < x.k; i += 16) {
                int32x4_t fours = vreinterpretq_s32_s8(vld1q_s8(from + i));
                vst1_s8(to + i * rows + r * 8, vreinterpret_s8_s32(vget_low_s32(vuzp1q_s32(fours, fours))));
                vst1_s8(to + (i + 8) * rows + r * 8, vreinterpret_s8_s32(vget_low_s32(vuzp2q_s32(fours, fours))));
            }
        }
        int32_t *offsets = x.packed_offsets + size_t(first) * size_t(groups);
        const int32_t *sums = x.offsets + size_t(first) * size_t(groups);
        for (int r = 0; r < rows; ++r) {
            for (int g = 0; g < groups; ++g) offsets[g * rows + r] = sums[r * groups + g];
        }
    }
}

// An accumulator is two tokens by two rows: t0 r0, t0 r1, t1 r0, t1 r1. A token that has no second is its own: no tile is padded.
template <int T> int8x16_t token_pair(const int8_t *eight, int pair) {
    if (2 * pair + 1 < T) return vld1q_s8(eight + pair * 16);
    return vreinterpretq_s8_s64(vld1q_dup_s64(reinterpret_cast<const int64_t *>(eight + pair * 16)));
}

template <int T> int32x4_t offset_pair(const int32_t *offsets, int pair) {
    if (2 * pair + 1 >= T) return vld1q_dup_s32(offsets + pair * 2);
    if (T == 4) {
        int32x4_t four = vld1q_s32(offsets);
        return pair == 0 ? vzip1q_s32(four, four) : vzip2q_s32(four, four);
    }
    int32x2_t two = vld1_s32(offsets + pair * 2);
    return vcombine_s32(vdup_lane_s32(two, 0), vdup_lane_s32(two, 1));
}

// [s0 s1 s2 s3] as the row scales of accumulators of rows 0, 1 and of rows 2, 3.
inline float32x4_t row_pair(float32x4_t scales, int pair) {
    float64x2_t both = vreinterpretq_f64_f32(scales);
    return vreinterpretq_f32_f64(pair == 0 ? vdupq_laneq_f64(both, 0) : vdupq_laneq_f64(both, 1));
}

// The four rows of `pair`'s two accumulators that belong to its first or second token.
inline float32x4_t token_rows(float32x4_t rows01, float32x4_t rows23, int second) {
    float64x2_t a = vreinterpretq_f64_f32(rows01), b = vreinterpretq_f64_f32(rows23);
    return vreinterpretq_f32_f64(second == 0 ? vzip1q_f64(a, b) : vzip2q_f64(a, b));
}

inline uint8x16_t zip(uint8x16_t a, uint8x16_t b, int high) {
    uint32x4_t x = vreinterpretq_u32_u8(a), y = vreinterpretq_u32_u8(b);
    return vreinterpretq_u8_u32(high == 0 ? vzip1q_u32(x, y) : vzip2q_u32(x, y));
}

template <int T>
__attribute__((always_inline)) inline void store_tile(float32x4_t (&total)[(T + 1) / 2][4], const float *scales, float *y, size_t stride, int rows) {
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
        float32x4_t first = token_rows(total[t / 2][0], total[t / 2][1], t % 2);
        float32x4_t second = token_rows(total[t / 2][2], total[t / 2][3], t % 2);
        store_rows(y + size_t(t) * stride, vmulq_n_f32(first, scales[t]), rows);
        store_rows(y + size_t(t) * stride + 4, vmulq_n_f32(second, scales[t]), rows - 4);
    }
}

template <int T>
PF_I8MM void int4_tile(const Matrix &w, const uint8_t *panel, int half, const Rows &x, int first, float *y, size_t stride, int rows) {
    constexpr int P = (T + 1) / 2;
    const uint8_t *codes = panel + w.scale_bytes() + half * 32;
    const uint16_t *scales = reinterpret_cast<const uint16_t *>(panel) + half * 8;
    const int8_t *tokens = x.packed + size_t(first) * size_t(x.k);
    const int32_t *offsets = x.packed_offsets + size_t(first) * size_t(w.groups());
    float32x4_t total[P][4];
#pragma GCC unroll 8
    for (int i = 0; i < P * 4; ++i) total[i / 4][i % 4] = vdupq_n_f32(0.0f);
    for (int g = 0, groups = w.groups(); g < groups; ++g) {
        int32x4_t acc[P][4];
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) acc[p][0] = acc[p][1] = acc[p][2] = acc[p][3] = offset_pair<T>(offsets, p);
#pragma GCC unroll 2
        for (int b = 0; b < 4; b += 2) {
            int8x16_t x0[P], x1[P];
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p) {
                x0[p] = token_pair<T>(tokens + b * 8 * T, p);
                x1[p] = token_pair<T>(tokens + (b + 1) * 8 * T, p);
            }
            uint8x16_t both[4];
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {  // two rows
                const uint8_t *at = codes + b * 64 + r / 2 * 16;
                both[r] = zip(vld1q_u8(at), vld1q_u8(at + 64), r % 2);
            }
            int8x16_t low[4], high[4];
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) low[r] = low_nibbles(both[r]);
#pragma GCC unroll 8
            for (int i = 0; i < 4 * P; ++i) acc[i % P][i / P] = vmmlaq_s32(acc[i % P][i / P], x0[i % P], low[i / P]);
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) high[r] = high_nibbles(both[r]);
#pragma GCC unroll 8
            for (int i = 0; i < 4 * P; ++i) acc[i % P][i / P] = vmmlaq_s32(acc[i % P][i / P], x1[i % P], high[i / P]);
        }
        float32x4_t four[2] = {Lanes::half4(scales), Lanes::half4(scales + 4)};
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
            float32x4_t scale = row_pair(four[r / 2], r % 2);
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p) total[p][r] = vfmaq_f32(total[p][r], vcvtq_f32_s32(acc[p][r]), scale);
        }
        codes += 256;
        scales += kPanel;
        tokens += kGroup * T;
        offsets += T;
    }
    store_tile<T>(total, x.scales + first, y, stride, rows);
}

template <int T>
PF_I8MM void int8_tile(const Matrix &w, const uint8_t *panel, int half, const Rows &x, int first, float *y, size_t stride, int rows) {
    constexpr int P = (T + 1) / 2;
    const uint8_t *codes = panel + w.scale_bytes() + half * 32;
    const float *scales = reinterpret_cast<const float *>(panel) + half * 8;
    const int8_t *tokens = x.packed + size_t(first) * size_t(x.k);
    int32x4_t acc[P][4];
#pragma GCC unroll 8
    for (int i = 0; i < P * 4; ++i) acc[i / 4][i % 4] = vdupq_n_s32(0);
    for (int i = 0; i < w.k; i += 16, codes += 256, tokens += 16 * T) {
#pragma GCC unroll 2
        for (int b = 0; b < 2; ++b) {  // columns 0-3 and 8-11, then 4-7 and 12-15
            int8x16_t two[4], eight[P];
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
                const uint8_t *at = codes + b * 64 + r / 2 * 16;
                two[r] = vreinterpretq_s8_u8(zip(vld1q_u8(at), vld1q_u8(at + 128), r % 2));
            }
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p) eight[p] = token_pair<T>(tokens + b * 8 * T, p);
#pragma GCC unroll 8
            for (int j = 0; j < 4 * P; ++j) acc[j % P][j / P] = vmmlaq_s32(acc[j % P][j / P], eight[j % P], two[j / P]);
        }
    }
    float32x4_t total[P][4];
#pragma GCC unroll 8
    for (int i = 0; i < P * 4; ++i) {
        float32x4_t scale = row_pair(vld1q_f32(scales + i % 4 / 2 * 4), i % 2);
        total[i / 4][i % 4] = vmulq_f32(vcvtq_f32_s32(acc[i / 4][i % 4]), scale);
    }
    store_tile<T>(total, x.scales + first, y, stride, rows);
}

constexpr Tile kInt4[kTile] = {int4_tile<1>, int4_tile<2>, int4_tile<3>, int4_tile<4>};
constexpr Tile kInt8[kTile] = {int8_tile<1>, int8_tile<2>, int8_tile<3>, int8_tile<4>};

void multiply(const Matrix &w, const Rows &x, int begin, int end, float *y, size_t stride) {
    if (x.count == 1) kNeonDotOps.multiply(w, x, begin, end, y, stride);
    else multiply_tiles(w.encoding == Matrix::kInt4 ? kInt4 : kInt8, w, x, begin, end, y, stride);
}

// Bit 13 of the second word is i8mm. No CPU has it without asimddp, but nothing says so.
bool supported() { return kNeonDotOps.supported() && (getauxval(AT_HWCAP2) >> 13 & 1) != 0; }

} // namespace

using F = FloatOps<Lanes>;
using A = AttentionOps<Lanes>;
const Ops kNeonI8mmOps = {"neon_i8mm", supported, multiply, pack,        F::quantize_row, F::rms_norm,
                          F::rope,     F::swiglu, F::add,   A::store_kv, A::attend,       F::log_sum_exp,
                          F::exponentials, nullptr, F::read};

} // namespace pf
#endif
