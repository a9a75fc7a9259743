// The specification: plain loops, one number at a time. Other variants must give the same bits.
#include "attention.h"

namespace pf {
namespace {

// Sixteen floats and nothing clever.
struct Lanes {
    static constexpr int kQueries = 2;
    float v[16];

    template <typename F> static Lanes each(F f) {
        Lanes r;
        for (int i = 0; i < 16; ++i) r.v[i] = f(i);
        return r;
    }
    static Lanes load(const float *p) { return each([&](int i) { return p[i]; }); }
    static Lanes set(float x) { return each([&](int) { return x; }); }
    static Lanes zero() { return set(0.0f); }
    static void store(float *p, Lanes a) { memcpy(p, a.v, sizeof a.v); }
    static Lanes load_half(const uint16_t *p) { return each([&](int i) { return half_to_float(p[i]); }); }
    static Lanes load_int8(const int8_t *p) { return each([&](int i) { return float(p[i]); }); }
    static void store_int8(int8_t *p, Lanes a) {
        for (int i = 0; i < 16; ++i) p[i] = a.v[i] == a.v[i] ? int8_t(a.v[i]) : int8_t(0);  // no number has no code
    }
    static void store_half(uint16_t *p, Lanes a) {
        for (int i = 0; i < 16; ++i) p[i] = float_to_half(a.v[i]);
    }
    friend Lanes operator+(Lanes a, Lanes b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
    friend Lanes operator-(Lanes a, Lanes b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
    friend Lanes operator*(Lanes a, Lanes b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
    friend Lanes operator/(Lanes a, Lanes b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
    static Lanes fma(Lanes a, Lanes b, Lanes c) { return each([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); }); }
    static Lanes larger(Lanes a, Lanes b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
    static Lanes smaller(Lanes a, Lanes b) { return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
    static Lanes abs(Lanes a) { return each([&](int i) { return __builtin_fabsf(a.v[i]); }); }
    static Lanes nearest(Lanes a) {
        // Adding and taking away 1.5 * 2^23 rounds to an integer, half to even; larger numbers are integers already.
        return each([&](int i) {
            float x = a.v[i];
            if (!(__builtin_fabsf(x) < 4194304.0f)) return x;
            volatile float shifted = x + 12582912.0f;
            return __builtin_copysignf(shifted - 12582912.0f, x);
        });
    }
    static Lanes power_of_two(Lanes a) {
        return each([&](int i) {
            uint32_t bits = uint32_t(int32_t(a.v[i]) + 127) << 23;
            float r;
            memcpy(&r, &bits, 4);
            return r;
        });
    }
    static float sum(Lanes a) {
        for (int step = 8; step > 0; step /= 2) {
            for (int i = 0; i < step; ++i) a.v[i] = a.v[i] + a.v[i + step];
        }
        return a.v[0];
    }
    static float top(Lanes a) {
        float r = a.v[0];
        for (int i = 1; i < 16; ++i) r = r > a.v[i] ? r : a.v[i];
        return r;
    }
    using Sum = uint64_t;
    static Sum no_sum() { return 0; }
    static Sum add_line(Sum sum, const uint8_t *p) {
        uint64_t words[8];
        memcpy(words, p, 64);
        for (uint64_t word : words) sum += word;
        return sum;
    }
    static uint64_t all(Sum sum) { return sum; }
    static int32_t sum_codes(const int8_t *codes) {
        int32_t sum = 0;
        for (int i = 0; i < kGroup; ++i) sum += codes[i];
        return sum;
    }
    template <int Q>
    static void dot_int8(const int8_t *keys, const int8_t *const *q, const int32_t *, int head_dim, Lanes *dots) {
        for (int t = 0; t < Q; ++t) {
            dots[t] = each([&](int lane) {
                int32_t sum = 0;
                for (int i = 0; i < head_dim; ++i) sum += int32_t(keys[(i / 4 * kPanel + lane) * 4 + i % 4]) * q[t][i];
                return float(sum);
            });
        }
    }
    static uint16_t float_to_half(float x) {
        // To nearest, half to even, as the hardware does; what is too large becomes infinite.
        uint32_t bits;
        memcpy(&bits, &x, 4);
        uint32_t sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
        if (rest > 0x7f800000u) return uint16_t(sign | 0x7e00u | ((rest >> 13) & 0x1ffu));
        if (rest >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
        if (rest < 0x38800000u) { // subnormal: a multiple of 2^-24
            float scaled = __builtin_fabsf(x) * 16777216.0f;
            return uint16_t(sign | uint32_t(int32_t(nearest(set(scaled)).v[0])));
        }
        uint32_t odd = (rest >> 13) & 1u;
        return uint16_t(sign | ((rest + 0xfffu + odd - 0x38000000u) >> 13));
    }
};

// One output: group by group, integers first, then one fused multiply-add with the group's scale.
float dot_int4(const Matrix &w, const uint8_t *panel, int row, const int8_t *x, float x_scale) {
    const uint16_t *scales = reinterpret_cast<const uint16_t *>(panel);
    const uint8_t *codes = panel + w.scale_bytes();
    float total = 0.0f;
    for (int g = 0; g < w.groups(); ++g) {
        int32_t sum = 0;
        for (int i = 0; i < kGroup; ++i) {
            uint8_t byte = codes[size_t(g) * 256 + size_t(i / 8) * 64 + size_t(row) * 4 + size_t(i % 4)];
            int code = int(i % 8 < 4 ? byte & 15 : byte >> 4) - 8;
            sum += code * x[g * kGroup + i];
        }
        total = __builtin_fmaf(float(sum), half_to_float(scales[g * kPanel + row]), total);
    }
    return total * x_scale;
}

float dot_int8_row(const Matrix &w, const uint8_t *panel, int row, const int8_t *x, float x_scale) {
    const float *scales = reinterpret_cast<const float *>(panel);
    const int8_t *codes = reinterpret_cast<const int8_t *>(panel + w.scale_bytes());
    int32_t sum = 0;
    for (int i = 0; i < w.k; ++i) sum += int32_t(codes[size_t(i / 4) * 64 + size_t(row) * 4 + size_t(i % 4)]) * x[i];
    return float(sum) * scales[row] * x_scale;
}

void multiply(const Matrix &w, const Rows &x, int begin, int end, float *y, size_t stride) {
    for (int p = begin; p < end; ++p) {
        for (int row = 0; row < kPanel && p * kPanel + row < w.rows; ++row) {
            for (int t = 0; t < x.count; ++t) {
                const int8_t *codes = x.codes + size_t(t) * size_t(x.k);
                y[size_t(t) * stride + size_t(p * kPanel + row)] =
                    (w.encoding == Matrix::kInt4 ? dot_int4 : dot_int8_row)(w, w.panel(p), row, codes, x.scales[t]);
            }
        }
    }
}

bool always() { return true; }

} // namespace

using F = FloatOps<Lanes>;
using A = AttentionOps<Lanes>;
const Ops kRefOps = {"ref",   always,      multiply,  nullptr,  F::quantize_row, F::rms_norm,   F::rope,
                     F::swiglu, F::add, A::store_kv, A::attend, F::log_sum_exp,
                       F::exponentials, F::router, F::add_scaled, nullptr, F::read};

} // namespace pf
