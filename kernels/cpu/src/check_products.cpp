// Products of quantized matrices, with codes, scales and activations at their ends.
#include "check.h"

namespace pf {
namespace check {
namespace {

enum Codes { kRandomCodes, kLowest, kHighest };
enum Scales { kRandomScales, kZero, kLargest, kDenormal };
enum Activations { kRandomRows, kPlus, kMinus };

struct Content {
    Codes codes;
    Scales scales;
    Activations rows;
};

// Each code's ends meet each activation's; sums and scales are as large, and as small, as they get.
constexpr Content kAll[kContents] = {
    {kRandomCodes, kRandomScales, kRandomRows}, {kLowest, kRandomScales, kPlus},   {kLowest, kLargest, kMinus},
    {kHighest, kLargest, kPlus},                {kHighest, kRandomScales, kMinus}, {kRandomCodes, kZero, kRandomRows},
    {kRandomCodes, kDenormal, kRandomRows},     {kLowest, kDenormal, kMinus},
};

void fill_matrix(const Matrix &w, uint8_t *data, Content content) {
    bool four = w.encoding == Matrix::kInt4;
    for (int p = 0; p < w.panels(); ++p, data += w.panel_bytes()) {
        memset(data, 0, w.scale_bytes());
        for (int i = 0; i < kPanel * (four ? w.groups() : 1); ++i) {
            uint16_t half = 0;  // the random ones: 2^-7 to 2^-3, and rarely negative
            if (content.scales == kRandomScales) half = uint16_t(0x2000u + random_bits() % 0x1000u + (random_bits() % 8 == 0 ? 0x8000u : 0));
            else if (content.scales == kLargest) half = 0x7bffu;
            else if (content.scales == kDenormal) half = uint16_t(random_bits() % 0x400u);
            float single = content.scales == kDenormal ? float(half) * 1e-42f : half_to_float(half);
            if (four) memcpy(data + i * 2, &half, 2);
            else memcpy(data + i * 4, &single, 4);
        }
        uint8_t lowest = four ? 0x00 : 0x80, highest = four ? 0xff : 0x7f;
        for (size_t i = 0; i < w.code_bytes(); ++i) {
            data[w.scale_bytes() + i] = content.codes == kRandomCodes ? uint8_t(random_bits()) : content.codes == kLowest ? lowest : highest;
        }
    }
}

void fill_rows(Rows &x, Activations kind) {
    for (int t = 0; t < x.count; ++t) {
        x.scales[t] = t % 5 == 4 ? 0.0f : 0.001f * float(1 + random_bits() % 1000);
        for (int g = 0; g < x.k / kGroup; ++g) {
            int32_t sum = 0;
            for (int i = 0; i < kGroup; ++i) {
                int code = kind == kPlus ? 127 : kind == kMinus ? -127 : int(random_bits() % 255) - 127;
                x.codes[size_t(t) * size_t(x.k) + size_t(g * kGroup + i)] = int8_t(code);
                sum += code;
            }
            x.offsets[t * (x.k / kGroup) + g] = -8 * sum;
        }
    }
}

} // namespace

// All panels with rows packed at once, then those but the first with rows packed in two parts, as threads do. What is not
// asked for must stay as it is. With `only`, that variant alone, once and whole.
void multiply(Matrix::Encoding encoding, int n, int k, int m, int content, const Ops *only) {
    Matrix w;
    w.encoding = encoding;
    w.rows = n;
    w.k = k;
    size_t codes = size_t(m) * size_t(k), groups = codes / kGroup, stride = size_t(n) + 3, outputs = size_t(m) * stride;
    Memory<uint8_t> data(w.bytes());
    Memory<int8_t> codes_of(codes), packed(codes);
    Memory<float> scales((size_t(m))), expected(outputs), found(outputs);
    Memory<int32_t> offsets(groups), packed_offsets(groups);
    w.data = data.data();
    fill_matrix(w, data.data(), kAll[content]);
    Rows x = {m, k, codes_of.data(), scales.data(), offsets.data(), packed.data(), packed_offsets.data()};
    fill_rows(x, kAll[content].rows);
    for (int begin = 0; begin < smaller(w.panels(), only != nullptr ? 1 : 2); ++begin) {
        for (size_t i = 0; i < outputs; ++i) expected[i] = -7.0f;
        kRefOps.multiply(w, x, begin, w.panels(), expected.data(), stride);
        for (int isa = 1; isa < ops_count(); ++isa) {
            const Ops &ops = *ops_at(isa);
            if (!ops.supported() || (only != nullptr && only != &ops)) continue;
            memset(packed.data(), 0x55, codes);
            for (size_t i = 0; i < outputs; ++i) found[i] = -7.0f;
            int cut = begin == 0 ? 0 : m / 2;
            if (m > 1 && ops.pack_rows != nullptr) {
                ops.pack_rows(x, 0, cut);
                ops.pack_rows(x, cut, m);
            }
            ops.multiply(w, x, begin, w.panels(), found.data(), stride);
            same(found.data(), expected.data(), outputs * sizeof(float), "%s multiply int%d N=%d K=%d M=%d from panel %d, content %d",
                 ops.name, encoding == Matrix::kInt4 ? 4 : 8, n, k, m, begin, content);
        }
    }
}

void multiply_by_output(const Ops &ops, int n, int k, int m) {
    size_t outputs = size_t(m) * size_t(n), width = size_t(k);
    Matrix w = {Matrix::kInt4Out, nullptr, n, k, false};
    Memory<uint8_t> data(w.bytes());
    Memory<float> x(size_t(m) * width), found(outputs), expected(outputs);
    Memory<int32_t> index((size_t(m)));
    for (size_t i = 0; i < data.size(); ++i) data[i] = uint8_t(random_bits());
    for (int pair = 0; pair < w.pairs(); ++pair) {
        for (size_t i = 0; i < width; ++i) {
            uint16_t half = uint16_t(0x1c00u + random_bits() % 0x1000u);
            memcpy(data.data() + size_t(pair) * w.pair_bytes() + 2 * i, &half, 2);
        }
    }
    w.data = data.data();
    for (size_t i = 0; i < x.size(); ++i) x[i] = random_float(i % 31 == 5 ? 50.0f : 2.0f);
    for (int t = 0; t < m; ++t) index[size_t(t)] = int32_t(random_bits() % uint32_t(m));
    RowMemory memory;
    if (!memory.allocate(size_t(m), width)) exit(2);
    multiply_out(ops, w, x.data(), index.data(), m, 0, w.pairs(), found.data(), size_t(n), memory.rows(0, m, k));
    multiply_out(kRefOps, w, x.data(), index.data(), m, 0, w.pairs(), expected.data(), size_t(n), memory.rows(0, m, k));
    same(found.data(), expected.data(), outputs * sizeof(float), "%s multiply by output N=%d K=%d M=%d", ops.name, n, k, m);
}

} // namespace check
} // namespace pf
