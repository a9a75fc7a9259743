// Choosing a token: the likeliest, or drawn from the likeliest ones (Holtzman et al., arXiv 1904.09751).
#include "common.h"

#include "ops.h"

namespace {

struct Choice {
    float p;
    int32_t id;
};

int32_t likeliest(const float *logits, int32_t size) {
    int32_t best = 0;
    for (int32_t i = 1; i < size; ++i) {
        if (logits[i] > logits[best]) best = i;
    }
    return best;
}

int by_probability(const void *a, const void *b) {
    const Choice *x = static_cast<const Choice *>(a), *y = static_cast<const Choice *>(b);
    if (x->p != y->p) return x->p > y->p ? -1 : 1;
    return x->id < y->id ? -1 : 1;
}

// xorshift64*: [0, 1) in steps of 2^-24.
float uniform(uint64_t *state) {
    uint64_t x = *state == 0 ? 88172645463325252ull : *state;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    *state = x;
    return float((x * 2685821657736338717ull) >> 40) * (1.0f / 16777216.0f);
}

} // namespace

extern "C" int32_t pf_sample(const float *logits, int32_t size, float temperature, float top_p, uint64_t *state) {
    int32_t best = likeliest(logits, size);
    if (!(temperature > 0)) return best;
    pf::Buffer<float> powers;
    pf::Buffer<Choice> choices;
    if (!powers.allocate(pf::round_up(size_t(size), 16)) || !choices.allocate(size_t(size))) return best;
    for (int32_t i = 0; i < size; ++i) powers[size_t(i)] = (logits[i] - logits[best]) / temperature;
    pf::kRefOps.exponentials(powers.data(), int(powers.size()));
    double total = 0;
    for (int32_t i = 0; i < size; ++i) {
        if (logits[i] == -__builtin_inff()) powers[size_t(i)] = 0;  // the exponential stops at e^-87
        choices[size_t(i)] = {powers[size_t(i)], i};
        total += double(powers[size_t(i)]);
    }
    qsort(choices.data(), choices.size(), sizeof(Choice), by_probability);
    // A token stays while what stands before it has not reached top_p, so the likeliest always does.
    size_t kept = 0;
    double mass = 0;
    while (kept < choices.size() && (kept == 0 || mass < double(top_p) * total)) mass += double(choices[kept++].p);
    double left = double(uniform(state)) * mass;
    for (size_t i = 0; i < kept; ++i) {
        left -= double(choices[i].p);
        if (left < 0) return choices[i].id;
    }
    return choices[kept - 1].id;
}

