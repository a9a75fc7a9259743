// 64-bit Arm with `smmla`, 2 x 8 by 8 x 2 bytes at once: phones since about 2021. One token alone runs as without it.
#include "neon_lanes.h"

#if defined(__aarch64__)
#include <sys/auxv.h>

namespace pf {
namespace {

constexpr int kTile = 8;

// Tiles of up to 8 tokens (tile_rows): [k / 8][tokens of the tile][8]. The instruction sums over 8 columns in
// whatever order both operands have them. Of each 16 columns the first eight here are 0-3 and 8-11 and the others 4-7 and 12-15,
// for then the weights need one `zip` a register, before their nibbles are taken apart.
void pack(Rows &x, int first, int last) {
    int tile = tile_rows(x.count, kTile);
    first = (first + tile - 1) / tile * tile;
    for (int groups = x.k / kGroup; first < last; first += tile) {
        int rows = smaller(tile, x.count - first);
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
    if (pair / 2 * 4 + 4 <= T) {
        int32x4_t four = vld1q_s32(offsets + pair / 2 * 4);
        return pair % 2 == 0 ? vzip1q_s32(four, four) : vzip2q_s32(four, four);
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

// Pairs of rows of a tile: 8 tokens by 4 rows take each weight apart once for eight tokens; of few tokens 8 rows fill the
// registers better. Either way 8 accumulators of integers, 8 of floats and the operands fit 32 registers.
template <int T> constexpr int kPairs = T > 4 ? 2 : 4;
template <int T> using Floats32 = float32x4_t[(T + 1) / 2][kPairs<T>];

template <int T>
__attribute__((always_inline)) inline void store_tile(Floats32<T> &total, const float *scales, float *y, size_t stride, int rows) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
        for (int r = 0; r < kPairs<T>; r += 2) {
            float32x4_t four = token_rows(total[t / 2][r], total[t / 2][r + 1], t % 2);
            store_rows(y + size_t(t) * stride + 2 * r, vmulq_n_f32(four, scales[t]), rows - 2 * r);
        }
    }
}

template <int T>
PF_I8MM void int4_tile(const Matrix &w, const uint8_t *panel, int row, const Rows &x, int first, float *y, size_t stride, int rows) {
    constexpr int P = (T + 1) / 2, R = kPairs<T>;
    const uint8_t *codes = panel + w.scale_bytes() + row * 4;
    const uint16_t *scales = reinterpret_cast<const uint16_t *>(panel) + row;
    const int8_t *tokens = x.packed + size_t(first) * size_t(x.k);
    const int32_t *offsets = x.packed_offsets + size_t(first) * size_t(w.groups());
    Floats32<T> total;
#pragma GCC unroll 8
    for (int i = 0; i < P * R; ++i) total[i / R][i % R] = vdupq_n_f32(0.0f);
    for (int g = 0, groups = w.groups(); g < groups; ++g) {
        int32x4_t acc[P][R];
#pragma GCC unroll 8
        for (int i = 0; i < P * R; ++i) acc[i / R][i % R] = offset_pair<T>(offsets, i / R);
#pragma GCC unroll 2
        for (int b = 0; b < 4; b += 2) {
            int8x16_t x0[P], x1[P];
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) {
                x0[p] = token_pair<T>(tokens + b * 8 * T, p);
                x1[p] = token_pair<T>(tokens + (b + 1) * 8 * T, p);
            }
            uint8x16_t both[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {  // two rows
                const uint8_t *at = codes + b * 64 + r / 2 * 16;
                both[r] = zip(vld1q_u8(at), vld1q_u8(at + 64), r % 2);
            }
            int8x16_t low[R], high[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) low[r] = low_nibbles(both[r]);
#pragma GCC unroll 8
            for (int i = 0; i < R * P; ++i) acc[i % P][i / P] = vmmlaq_s32(acc[i % P][i / P], x0[i % P], low[i / P]);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) high[r] = high_nibbles(both[r]);
#pragma GCC unroll 8
            for (int i = 0; i < R * P; ++i) acc[i % P][i / P] = vmmlaq_s32(acc[i % P][i / P], x1[i % P], high[i / P]);
        }
        float32x4_t four[R / 2];
#pragma GCC unroll 2
        for (int r = 0; r < R / 2; ++r) four[r] = Lanes::half4(scales + 4 * r);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            float32x4_t scale = row_pair(four[r / 2], r % 2);
#pragma GCC unroll 4
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
PF_I8MM void int8_tile(const Matrix &w, const uint8_t *panel, int row, const Rows &x, int first, float *y, size_t stride, int rows) {
    constexpr int P = (T + 1) / 2, R = kPairs<T>;
    const uint8_t *codes = panel + w.scale_bytes() + row * 4;
    const float *scales = reinterpret_cast<const float *>(panel) + row;
    const int8_t *tokens = x.packed + size_t(first) * size_t(x.k);
    int32x4_t acc[P][R];
#pragma GCC unroll 8
    for (int i = 0; i < P * R; ++i) acc[i / R][i % R] = vdupq_n_s32(0);
    for (int i = 0; i < w.k; i += 16, codes += 256, tokens += 16 * T) {
#pragma GCC unroll 2
        for (int b = 0; b < 2; ++b) {  // columns 0-3 and 8-11, then 4-7 and 12-15
            int8x16_t two[R], eight[P];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const uint8_t *at = codes + b * 64 + r / 2 * 16;
                two[r] = vreinterpretq_s8_u8(zip(vld1q_u8(at), vld1q_u8(at + 128), r % 2));
            }
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) eight[p] = token_pair<T>(tokens + b * 8 * T, p);
#pragma GCC unroll 8
            for (int j = 0; j < R * P; ++j) acc[j % P][j / P] = vmmlaq_s32(acc[j % P][j / P], eight[j % P], two[j / P]);
        }
    }
    Floats32<T> total;
#pragma GCC unroll 8
    for (int i = 0; i < P * R; ++i) {
        float32x4_t scale = row_pair(vld1q_f32(scales + i % R / 2 * 4), i % 2);
        total[i / R][i % R] = vmulq_f32(vcvtq_f32_s32(acc[i / R][i % R]), scale);
    }
    store_tile<T>(total, x.scales + first, y, stride, rows);
}

template <int T> constexpr TileShape kInt4Shape = {int4_tile<T>, 2 * kPairs<T>};
template <int T> constexpr TileShape kInt8Shape = {int8_tile<T>, 2 * kPairs<T>};
constexpr TileShape kInt4[kTile] = {kInt4Shape<1>, kInt4Shape<2>, kInt4Shape<3>, kInt4Shape<4>,
                                    kInt4Shape<5>, kInt4Shape<6>, kInt4Shape<7>, kInt4Shape<8>};
constexpr TileShape kInt8[kTile] = {kInt8Shape<1>, kInt8Shape<2>, kInt8Shape<3>, kInt8Shape<4>,
                                    kInt8Shape<5>, kInt8Shape<6>, kInt8Shape<7>, kInt8Shape<8>};

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
                       F::exponentials, F::router, F::add_scaled, nullptr, F::read};

} // namespace pf
#endif
