// pocketforge-check: every kernel variant that this machine can run against the reference, bit by bit. Prints one JSON object.
#include <initializer_list>

#include "ops.h"

namespace {

using namespace pf;

struct Report {
    long checks = 0, failed = 0;
    char texts[8][128];
} report;

uint64_t state = 1;

uint32_t random_bits() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return uint32_t(state >> 16);
}

float random_float(float range) { return (float(random_bits() & 0xffffffu) / 8388608.0f - 1.0f) * range; }

// Some memory of one test. A test cannot go on without it.
template <typename T> struct Memory : Buffer<T> {
    explicit Memory(size_t count) {
        if (this->allocate(count)) return;
        fprintf(stderr, "error: no memory\n");
        exit(2);
    }
};

__attribute__((format(printf, 4, 5))) void same(const void *found, const void *expected, size_t bytes, const char *format, ...) {
    ++report.checks;
    if (memcmp(found, expected, bytes) == 0) return;
    if (report.failed++ >= 8) return;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(report.texts[report.failed - 1], sizeof report.texts[0], format, arguments);
    va_end(arguments);
}

// ---- products ---------------------------------------------------------------------------------------------------

enum Codes { kRandomCodes, kLowest, kHighest };
enum Scales { kRandomScales, kZero, kLargest, kDenormal };
enum Activations { kRandomRows, kPlus, kMinus };

struct Content {
    Codes codes;
    Scales scales;
    Activations rows;
};

// Each code's ends meet each activation's; sums and scales are as large, and as small, as they get.
constexpr Content kContents[] = {
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

// All panels with rows packed at once, then those but the first with rows packed in two parts, as threads do. What is not
// asked for must stay as it is. With `only`, that variant alone, once and whole.
void check_multiply(Matrix::Encoding encoding, int n, int k, int m, int number, const Ops *only = nullptr) {
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
    fill_matrix(w, data.data(), kContents[number]);
    Rows x = {m, k, codes_of.data(), scales.data(), offsets.data(), packed.data(), packed_offsets.data()};
    fill_rows(x, kContents[number].rows);
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
                 ops.name, encoding == Matrix::kInt4 ? 4 : 8, n, k, m, begin, number);
        }
    }
}

// ---- the float half ---------------------------------------------------------------------------------------------

constexpr int kRowKinds = 9;

void fill_floats(float *x, int n, int kind) {
    for (int i = 0; i < n; ++i) {
        float tie = float(int(random_bits() % 253) - 126) + 0.5f;  // the first is 127: the scale is 1, the code a half
        switch (kind) {
        case 0: x[i] = random_float(3.0f); break;
        case 1: x[i] = 0.0f; break;
        case 2: x[i] = -0.0f; break;
        case 3: x[i] = i == 0 ? 127.0f : tie; break;
        case 4: x[i] = random_float(1e18f); break;      // squares stay finite
        case 5: x[i] = random_float(1e-38f); break;     // mostly below the normal numbers
        case 6: x[i] = i == n / 2 ? -1000.0f : random_float(0.01f); break;
        case 7: x[i] = random_float(100.0f); break;
        default: x[i] = random_float(1e-43f); break;    // so small that the scale is 0
        }
    }
}

void check_floats(const Ops &ops, int n, int kind) {
    const Ops &ref = kRefOps;
    size_t size = size_t(n);
    Memory<float> x(size), y(size), found(size), expected(size);
    Memory<int8_t> codes(2 * size);
    Memory<int32_t> offsets(2 * size / kGroup);
    float scales[2];
    fill_floats(x.data(), n, kind);
    fill_floats(y.data(), n, 0);
    auto compare = [&](const char *what) { same(found.data(), expected.data(), size * sizeof(float), "%s %s n=%d kind %d", ops.name, what, n, kind); };

    ops.quantize_row(x.data(), n, codes.data(), scales, offsets.data());
    ref.quantize_row(x.data(), n, codes.data() + n, scales + 1, offsets.data() + n / kGroup);
    same(codes.data(), codes.data() + n, size, "%s quantize_row: codes, n=%d kind %d", ops.name, n, kind);
    same(scales, scales + 1, sizeof(float), "%s quantize_row: scale, n=%d kind %d", ops.name, n, kind);
    same(offsets.data(), offsets.data() + n / kGroup, size / kGroup * 4, "%s quantize_row: offsets, n=%d kind %d", ops.name, n, kind);

    for (const float *weight : {static_cast<const float *>(nullptr), static_cast<const float *>(y.data())}) {
        ops.rms_norm(x.data(), weight, n, 1e-5f, found.data());
        ref.rms_norm(x.data(), weight, n, 1e-5f, expected.data());
        compare(weight == nullptr ? "rms_norm" : "rms_norm with a weight");
    }
    ops.swiglu(x.data(), y.data(), n, found.data());
    ref.swiglu(x.data(), y.data(), n, expected.data());
    compare("swiglu");

    auto in_place = [&](const char *what, void (*run)(const Ops &, float *, const float *, int)) {
        memcpy(found.data(), x.data(), size * sizeof(float));
        memcpy(expected.data(), x.data(), size * sizeof(float));
        run(ops, found.data(), y.data(), n);
        run(ref, expected.data(), y.data(), n);
        compare(what);
    };
    in_place("add", [](const Ops &o, float *a, const float *b, int count) { o.add(a, b, count); });
    in_place("exponentials", [](const Ops &o, float *a, const float *, int count) { o.exponentials(a, count); });
    if (n <= 128) in_place("rope", [](const Ops &o, float *a, const float *b, int count) { o.rope(a, count, {b, b}); });
    for (int count : {1, n / 2 + 1, n - 1, n}) {
        ops.log_sum_exp(x.data(), count, scales);
        ref.log_sum_exp(x.data(), count, scales + 1);
        same(scales, scales + 1, sizeof(float), "%s log_sum_exp of %d, kind %d", ops.name, count, kind);
    }
}

void check_read(const Ops &ops, size_t bytes) {
    Memory<uint64_t> words(bytes / 8 + 1);
    for (size_t i = 0; i < words.size(); ++i) words[i] = uint64_t(random_bits()) << 32 | random_bits();
    const uint8_t *data = reinterpret_cast<const uint8_t *>(words.data());
    uint64_t found = ops.read(data, bytes), expected = kRefOps.read(data, bytes);
    same(&found, &expected, sizeof found, "%s read of %zu bytes", ops.name, bytes);
}

// `tokens` tokens through a ring of `blocks` blocks, as a session fills it; then up to 8 queries, each with its own window.
void check_attention(const Ops &ops, KvLayout layout, int tokens, int blocks) {
    size_t size = size_t(blocks) * layout.block_bytes();
    int d = layout.head_dim, kept = smaller(tokens, (blocks - 1) * kPanel);
    size_t scores = size_t(kQueryTile) * size_t(blocks + 1) * kPanel, outputs = size_t(kQueryTile) * size_t(d);
    Memory<uint8_t> found(size), expected(size);
    Memory<float> key((size_t(d))), value((size_t(d))), q(outputs), results(2 * outputs), scratch(scores);
    KvRing ours = {found.data(), blocks, layout}, theirs = {expected.data(), blocks, layout};
    for (int t = 0; t < tokens; ++t) {
        fill_floats(key.data(), d, t % 11 == 3 ? 6 : 0);
        fill_floats(value.data(), d, t % 7 == 2 ? 5 : t % 13 == 1 ? 7 : 0);
        ops.store_kv(ours, t, key.data(), value.data());
        kRefOps.store_kv(theirs, t, key.data(), value.data());
    }
    same(found.data(), expected.data(), size, "%s store_kv type %d d=%d, %d tokens in %d blocks", ops.name, layout.type, d, tokens, blocks);
    for (int count = 1; count <= kQueryTile; ++count) {
        Query queries[2][kQueryTile];
        fill_floats(q.data(), int(outputs), count % 2 == 0 ? 0 : 6);
        for (int i = 0; i < count; ++i) {
            int last = larger(tokens - count + i, 0), oldest = tokens - kept;
            int first = count % 3 == 0 ? oldest : smaller(last, oldest + int(random_bits() % uint32_t(kept)));
            for (int j = 0; j < 2; ++j) queries[j][i] = {q.data() + i * d, results.data() + size_t(j) * outputs + size_t(i) * size_t(d), first, last};
        }
        ops.attend(ours, queries[0], count, 0.125f, scratch.data());
        kRefOps.attend(theirs, queries[1], count, 0.125f, scratch.data());
        same(results.data(), results.data() + outputs, size_t(count) * size_t(d) * sizeof(float),
             "%s attend type %d d=%d, %d tokens in %d blocks, %d queries", ops.name, layout.type, d, tokens, blocks, count);
    }
}

void check_all(bool quick) {
    for (int number = 0; number < int(sizeof kContents / sizeof kContents[0]); ++number) {
        for (int n : {16, 17, 48, 576}) {
            for (int k : {32, 64, 96, 576}) {
                if (quick && n > 48) continue;
                for (int m : {1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 25}) {
                    check_multiply(Matrix::kInt4, n, k, m, number);
                    check_multiply(Matrix::kInt8, n, k, m, number);
                }
            }
        }
    }
    for (int isa = 1; isa < ops_count(); ++isa) {
        const Ops &ops = *ops_at(isa);
        if (!ops.supported()) continue;
        for (int n : {32, 64, 96, 128, 576, 4096}) {
            if (quick && n > 576) continue;
            for (int kind = 0; kind < kRowKinds; ++kind) check_floats(ops, n, kind);
        }
        for (size_t bytes : {size_t(0), size_t(64), size_t(1000), size_t(65536)}) check_read(ops, bytes);
        for (int type : {PF_KV_F32, PF_KV_F16, PF_KV_INT8}) {
            for (int d : {32, 64, 96, 128}) {
                KvLayout layout = {d, type};
                check_attention(ops, layout, 8, 2);
                check_attention(ops, layout, 40, 4);
                check_attention(ops, layout, 150, 4);  // around the ring, twice
                if (!quick) check_attention(ops, layout, 1000, 64);
            }
        }
    }
}

// One product, for tools that count instructions: "ISA int4|int8 N K M".
bool check_one(char **arguments) {
    int sizes[3];
    for (int i = 0; i < 3; ++i) sizes[i] = atoi(arguments[2 + i]);
    bool four = strcmp(arguments[1], "int4") == 0;
    if (sizes[0] < 1 || sizes[1] < kGroup || sizes[1] % kGroup != 0 || sizes[2] < 1) return false;
    if (!four && strcmp(arguments[1], "int8") != 0) return false;
    for (int isa = 1; isa < ops_count(); ++isa) {
        const Ops *ops = ops_at(isa);
        if (strcmp(arguments[0], ops->name) != 0 || !ops->supported()) continue;
        check_multiply(four ? Matrix::kInt4 : Matrix::kInt8, sizes[0], sizes[1], sizes[2], 0, ops);
        return true;
    }
    return false;
}

} // namespace

int main(int argc, char **argv) {
    bool quick = argc == 2 && strcmp(argv[1], "--quick") == 0, one = argc == 7 && strcmp(argv[1], "--one") == 0;
    if ((argc > 1 && !quick && !one) || (one && !check_one(argv + 2))) {
        fputs("usage: pocketforge-check [--quick]                            --quick: fewer shapes, for an emulated CPU\n"
              "       pocketforge-check --one VARIANT int4|int8 N K M       one product of one variant that runs here\n",
              stderr);
        return 2;
    }
    if (!one) check_all(quick);
    printf("{\"isa\":[");
    for (int isa = 0, printed = 0; isa < ops_count(); ++isa) {
        if (ops_at(isa)->supported()) printf("%s\"%s\"", printed++ == 0 ? "" : ",", ops_at(isa)->name);
    }
    printf("],\"checks\":%ld,\"failed\":%ld,\"failures\":[", report.checks, report.failed);
    for (long i = 0; i < smaller<long>(report.failed, 8); ++i) printf("%s\"%s\"", i == 0 ? "" : ",", report.texts[i]);
    printf("]}\n");
    return report.failed == 0 ? 0 : 1;
}
