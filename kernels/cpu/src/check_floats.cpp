// The float half of the kernels: rounding of activations, norms, attention and what belongs to it.
#include "check.h"

namespace pf {
namespace check {
namespace {

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

} // namespace

void floats(const Ops &ops, int n, int kind) {
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
    in_place("add_scaled", [](const Ops &o, float *a, const float *b, int count) { o.add_scaled(a, b, 0.3f, count); });
    in_place("exponentials", [](const Ops &o, float *a, const float *, int count) { o.exponentials(a, count); });
    if (n <= 128) in_place("rope", [](const Ops &o, float *a, const float *b, int count) { o.rope(a, count, {b, b}); });
    for (int count : {1, n / 2 + 1, n - 1, n}) {
        ops.log_sum_exp(x.data(), count, scales);
        ref.log_sum_exp(x.data(), count, scales + 1);
        same(scales, scales + 1, sizeof(float), "%s log_sum_exp of %d, kind %d", ops.name, count, kind);
    }
}

void router(const Ops &ops, int tokens, int experts, int n, int kind) {
    Memory<float> x(size_t(tokens) * size_t(n)), w(size_t(experts) * size_t(n)), logits(2 * size_t(tokens) * size_t(experts));
    fill_floats(x.data(), tokens * n, kind);
    fill_floats(w.data(), experts * n, 0);
    float *expected = logits.data() + size_t(tokens) * size_t(experts);
    ops.router(x.data(), w.data(), tokens, experts, n, logits.data());
    kRefOps.router(x.data(), w.data(), tokens, experts, n, expected);
    size_t bytes = size_t(tokens) * size_t(experts) * sizeof(float);
    same(logits.data(), expected, bytes, "%s router %d tokens, %d experts, n=%d kind %d", ops.name, tokens, experts, n, kind);
    // Their scores, weights and choices: what a variant adds is its exponential.
    int32_t chosen[2][kMostChosen];
    float weights[2][kMostChosen];
    Memory<float> bias((size_t(experts)));
    fill_floats(bias.data(), experts, 6);
    for (int i = 0; i < 4; ++i) {
        RouterRule rule = {experts, smaller(experts, 8), i % 2 == 1, i / 2 == 1, 2.5f};
        for (int t = 0; t < tokens; ++t) {
            route(ops, rule, expected + t * experts, bias.data(), chosen[0], weights[0]);
            route(kRefOps, rule, expected + t * experts, bias.data(), chosen[1], weights[1]);
            size_t size = size_t(rule.top_k) * 4;
            same(chosen[0], chosen[1], size, "%s route, %d experts, token %d, kind %d, rule %d: ids", ops.name, experts, t, kind, i);
            same(weights[0], weights[1], size, "%s route, %d experts, token %d, kind %d, rule %d: weights", ops.name, experts, t, kind, i);
        }
    }
}

void read(const Ops &ops, size_t bytes) {
    Memory<uint64_t> words(bytes / 8 + 1);
    for (size_t i = 0; i < words.size(); ++i) words[i] = uint64_t(random_bits()) << 32 | random_bits();
    const uint8_t *data = reinterpret_cast<const uint8_t *>(words.data());
    uint64_t found = ops.read(data, bytes), expected = kRefOps.read(data, bytes);
    same(&found, &expected, sizeof found, "%s read of %zu bytes", ops.name, bytes);
}

// The ring is filled as a session fills it. Each query has its own window.
void attention(const Ops &ops, KvLayout layout, int tokens, int blocks) {
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

} // namespace check
} // namespace pf
