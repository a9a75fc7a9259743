// 64-bit Arm with `sdot`, four products of bytes a lane: phones since about 2018.
#include "neon_lanes.h"

#if defined(__aarch64__)
#include <sys/auxv.h>

namespace pf {
namespace {

// The four bytes of lane `lane` of x with each row's four of `codes`. A lane is part of the instruction, so it is known here
// only where the loop around the call is unrolled.
PF_DOTPROD inline int32x4_t dot(int32x4_t acc, int8x16_t codes, int8x16_t x, int lane) {
    switch (lane) {
    case 0: return vdotq_laneq_s32(acc, codes, x, 0);
    case 1: return vdotq_laneq_s32(acc, codes, x, 1);
    case 2: return vdotq_laneq_s32(acc, codes, x, 2);
    default: return vdotq_laneq_s32(acc, codes, x, 3);
    }
}

// ---- dotprod: one token -----------------------------------------------------------------------------------------

// S panels that lie apart: memory sets the pace, and one core reads several streams faster than one. Two of them have 16
// accumulators; a third would not fit. The lines of kAhead bytes further on are asked for, into the second cache.
constexpr int kStreams = 2, kAhead = 4096;

template <int S> PF_DOTPROD void int4_vector(const Matrix &w, int first, int step, const Rows &x, float *y) {
    const uint8_t *scales[S], *codes[S];
    float32x4_t total[S][4];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
        scales[s] = w.panel(first + s * step);
        codes[s] = scales[s] + w.scale_bytes();
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) total[s][r] = vdupq_n_f32(0.0f);
    }
    for (int g = 0, groups = w.groups(); g < groups; ++g) {
        int8x16_t x0 = vld1q_s8(x.codes + g * kGroup), x1 = vld1q_s8(x.codes + g * kGroup + 16);
        int32x4_t offset = vld1q_dup_s32(x.offsets + g);
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) {
            int32x4_t acc[4] = {offset, offset, offset, offset};
            for (int b = 0; b < 4; ++b) __builtin_prefetch(codes[s] + b * 64 + kAhead, 0, 2);
#pragma GCC unroll 4
            for (int b = 0; b < 4; ++b) {
                int8x16_t four = b < 2 ? x0 : x1;
                uint8x16_t both[4];
#pragma GCC unroll 4
                for (int r = 0; r < 4; ++r) both[r] = vld1q_u8(codes[s] + b * 64 + r * 16);
                int8x16_t low[4];
#pragma GCC unroll 4
                for (int r = 0; r < 4; ++r) low[r] = low_nibbles(both[r]);
#pragma GCC unroll 4
                for (int r = 0; r < 4; ++r) acc[r] = dot(acc[r], low[r], four, b % 2 * 2);
                int8x16_t high[4];
#pragma GCC unroll 4
                for (int r = 0; r < 4; ++r) high[r] = high_nibbles(both[r]);
#pragma GCC unroll 4
                for (int r = 0; r < 4; ++r) acc[r] = dot(acc[r], high[r], four, b % 2 * 2 + 1);
            }
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
                float32x4_t scale = Lanes::half4(reinterpret_cast<const uint16_t *>(scales[s]) + r * 4);
                total[s][r] = vfmaq_f32(total[s][r], vcvtq_f32_s32(acc[r]), scale);
            }
            codes[s] += 256;
            scales[s] += 32;
        }
    }
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
        int at = (first + s * step) * kPanel;
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) store_rows(y + at + 4 * r, vmulq_n_f32(total[s][r], x.scales[0]), w.rows - at - 4 * r);
    }
}

template <int S> PF_DOTPROD void int8_vector(const Matrix &w, int first, int step, const Rows &x, float *y) {
    const int8_t *codes[S];
    int32x4_t acc[S][4];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
        codes[s] = reinterpret_cast<const int8_t *>(w.panel(first + s * step) + w.scale_bytes());
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) acc[s][r] = vdupq_n_s32(0);
    }
    for (int i = 0; i < w.k; i += 16) {
        int8x16_t four = vld1q_s8(x.codes + i);
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) {
            for (int b = 0; b < 4; ++b) __builtin_prefetch(codes[s] + b * 64 + kAhead, 0, 2);
#pragma GCC unroll 4
            for (int b = 0; b < 4; ++b) {
                int8x16_t rows[4];
#pragma GCC unroll 4
                for (int r = 0; r < 4; ++r) rows[r] = vld1q_s8(codes[s] + b * 64 + r * 16);
#pragma GCC unroll 4
                for (int r = 0; r < 4; ++r) acc[s][r] = dot(acc[s][r], rows[r], four, b);
            }
            codes[s] += 256;
        }
    }
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
        int at = (first + s * step) * kPanel;
        const float *scales = reinterpret_cast<const float *>(w.panel(first + s * step));
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
            float32x4_t value = vmulq_f32(vcvtq_f32_s32(acc[s][r]), vld1q_f32(scales + 4 * r));
            store_rows(y + at + 4 * r, vmulq_n_f32(value, x.scales[0]), w.rows - at - 4 * r);
        }
    }
}

void vector_all(const Matrix &w, const Rows &x, int begin, int end, float *y) {
    bool four = w.encoding == Matrix::kInt4;
    int step = (end - begin) / kStreams;
    for (int p = begin; p < begin + step; ++p) (four ? int4_vector<kStreams> : int8_vector<kStreams>)(w, p, step, x, y);
    for (int p = begin + step * kStreams; p < end; ++p) (four ? int4_vector<1> : int8_vector<1>)(w, p, 0, x, y);
}

// ---- dotprod: T tokens by 8 rows, straight from the tokens' rows of codes ------------------------------------------

template <int T>
PF_DOTPROD void int4_dot(const Matrix &w, const uint8_t *panel, int row, const Rows &x, int first, float *y, size_t stride,
                         int rows) {
    const uint8_t *codes = panel + w.scale_bytes() + row * 4;
    const uint16_t *scales = reinterpret_cast<const uint16_t *>(panel) + row;
    const int8_t *token[T];
    float32x4_t total[T][2];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
        token[t] = x.codes + size_t(first + t) * size_t(x.k);
        total[t][0] = total[t][1] = vdupq_n_f32(0.0f);
    }
    const int32_t *offsets = x.offsets + size_t(first) * size_t(w.groups());
    for (int g = 0, groups = w.groups(); g < groups; ++g) {
        int32x4_t acc[T][2];
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) acc[t][0] = acc[t][1] = vld1q_dup_s32(offsets + t * groups + g);
#pragma GCC unroll 2
        for (int b = 0; b < 4; b += 2) {
            int8x16_t four[T];
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) four[t] = vld1q_s8(token[t] + g * kGroup + b * 8);
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) {
                const uint8_t *at = codes + (b + i) * 64;
                uint8x16_t both[2] = {vld1q_u8(at), vld1q_u8(at + 16)};
                int8x16_t low[2] = {low_nibbles(both[0]), low_nibbles(both[1])};
#pragma GCC unroll 8
                for (int j = 0; j < 2 * T; ++j) acc[j / 2][j % 2] = dot(acc[j / 2][j % 2], low[j % 2], four[j / 2], i * 2);
                int8x16_t high[2] = {high_nibbles(both[0]), high_nibbles(both[1])};
#pragma GCC unroll 8
                for (int j = 0; j < 2 * T; ++j) acc[j / 2][j % 2] = dot(acc[j / 2][j % 2], high[j % 2], four[j / 2], i * 2 + 1);
            }
        }
        float32x4_t s0 = Lanes::half4(scales + g * kPanel), s1 = Lanes::half4(scales + g * kPanel + 4);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
            total[t][0] = vfmaq_f32(total[t][0], vcvtq_f32_s32(acc[t][0]), s0);
            total[t][1] = vfmaq_f32(total[t][1], vcvtq_f32_s32(acc[t][1]), s1);
        }
        codes += 256;
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
        store_rows(y + size_t(t) * stride, vmulq_n_f32(total[t][0], x.scales[first + t]), rows);
        store_rows(y + size_t(t) * stride + 4, vmulq_n_f32(total[t][1], x.scales[first + t]), rows - 4);
    }
}

template <int T>
PF_DOTPROD void int8_dot(const Matrix &w, const uint8_t *panel, int row, const Rows &x, int first, float *y, size_t stride,
                         int rows) {
    const int8_t *codes = reinterpret_cast<const int8_t *>(panel + w.scale_bytes()) + row * 4;
    const float *scales = reinterpret_cast<const float *>(panel) + row;
    int32x4_t acc[T][2];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) acc[t][0] = acc[t][1] = vdupq_n_s32(0);
    for (int i = 0; i < w.k; i += 16, codes += 256) {
        int8x16_t four[T];
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) four[t] = vld1q_s8(x.codes + size_t(first + t) * size_t(x.k) + i);
        int8x16_t eight[4][2];
#pragma GCC unroll 4
        for (int b = 0; b < 4; ++b) {
            eight[b][0] = vld1q_s8(codes + b * 64);
            eight[b][1] = vld1q_s8(codes + b * 64 + 16);
        }
#pragma GCC unroll 4
        for (int b = 0; b < 4; ++b) {
#pragma GCC unroll 8
            for (int j = 0; j < 2 * T; ++j) acc[j / 2][j % 2] = dot(acc[j / 2][j % 2], eight[b][j % 2], four[j / 2], b);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
        for (int r = 0; r < 2; ++r) {
            float32x4_t value = vmulq_f32(vcvtq_f32_s32(acc[t][r]), vld1q_f32(scales + 4 * r));
            store_rows(y + size_t(t) * stride + 4 * r, vmulq_n_f32(value, x.scales[first + t]), rows - 4 * r);
        }
    }
}

// 4 tokens by 8 rows: integers, floats and operands fit 32 registers.
constexpr TileShape kInt4Dot[] = {{int4_dot<1>, 8}, {int4_dot<2>, 8}, {int4_dot<3>, 8}, {int4_dot<4>, 8}};
constexpr TileShape kInt8Dot[] = {{int8_dot<1>, 8}, {int8_dot<2>, 8}, {int8_dot<3>, 8}, {int8_dot<4>, 8}};

void multiply(const Matrix &w, const Rows &x, int begin, int end, float *y, size_t stride) {
    if (x.count == 1) vector_all(w, x, begin, end, y);
    else multiply_tiles(w.encoding == Matrix::kInt4 ? kInt4Dot : kInt8Dot, w, x, begin, end, y, stride);
}

bool supported() { return (getauxval(AT_HWCAP) >> 20 & 1) != 0; }  // asimddp

} // namespace

using F = FloatOps<Lanes>;
using A = AttentionOps<Lanes>;
const Ops kNeonDotOps = {"neon_dotprod", supported, multiply, nullptr,     F::quantize_row, F::rms_norm,
                         F::rope,        F::swiglu, F::add,   A::store_kv, A::attend,       F::log_sum_exp,
                       F::exponentials, F::router, F::add_scaled, nullptr, F::read};

} // namespace pf
#endif
