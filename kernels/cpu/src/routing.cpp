#include "routing.h"

#include <float.h>

namespace pf {

namespace {

// Kept out of vector code: of what is no number, instruction sets disagree which operand a maximum returns.
inline float finite(float x) { return x != x || x > FLT_MAX ? FLT_MAX : x < -FLT_MAX ? -FLT_MAX : x; }

void sigmoids(const Ops &ops, const float *logits, int n, float *scores) {
    int padded = int(round_up(size_t(n), 16));
    for (int e = 0; e < n; ++e) scores[e] = -finite(logits[e]);
    for (int e = n; e < padded; ++e) scores[e] = 0.0f;
    ops.exponentials(scores, padded);
    for (int e = 0; e < n; ++e) scores[e] = 1.0f / (1.0f + scores[e]);
}

// Sums as everywhere: 16 lanes in order, then halves are added until one is left.
void softmax(const Ops &ops, const float *logits, int n, float *scores) {
    int padded = int(round_up(size_t(n), 16));
    float top = finite(logits[0]), lanes[16] = {};
    for (int e = 1; e < n; ++e) top = larger(top, finite(logits[e]));
    for (int e = 0; e < padded; ++e) scores[e] = e < n ? larger(finite(logits[e]) - top, -FLT_MAX) : 0.0f;
    ops.exponentials(scores, padded);
    for (int e = 0; e < n; ++e) lanes[e % 16] += scores[e];
    for (int step = 8; step > 0; step /= 2) {
        for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
    }
    for (int e = 0; e < n; ++e) scores[e] /= lanes[0];
}

} // namespace

void route(const Ops &ops, const RouterRule &rule, const float *logits, const float *bias, int32_t *chosen, float *weights) {
    float scores[kMostExperts], left[kMostExperts];
    int n = rule.experts, k = rule.top_k;
    (rule.softmax ? softmax : sigmoids)(ops, logits, n, scores);
    for (int e = 0; e < n; ++e) left[e] = finite(scores[e] + bias[e]);
    for (int j = 0; j < k; ++j) {
        int best = 0;
        for (int e = 1; e < n; ++e) {
            if (left[e] > left[best]) best = e;
        }
        left[best] = -__builtin_inff();  // below all that is left: those are finite
        int at = j;
        for (; at > 0 && chosen[at - 1] > best; --at) chosen[at] = chosen[at - 1];
        chosen[at] = best;
    }
    float sum = 0.0f;
    for (int j = 0; j < k; ++j) sum += scores[chosen[j]];
    sum = larger(sum, FLT_MIN);
    for (int j = 0; j < k; ++j) weights[j] = (rule.normalize ? scores[chosen[j]] / sum : scores[chosen[j]]) * rule.scale;
}

} // namespace pf
