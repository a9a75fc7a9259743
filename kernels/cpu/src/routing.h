// How a token chooses its experts. One scalar function for all variants: a row of logits is short.
#pragma once

#include "ops.h"

namespace pf {

constexpr int kMostExperts = 4096, kMostChosen = 64;

struct RouterRule {
    int experts = 0, top_k = 0;
    bool softmax = false;    // else sigmoid
    bool normalize = false;  // the weights of a token add up to `scale`
    float scale = 1.0f;
};

// The experts of one row of logits, ids ascending, and their weights. Scores are sigmoids, or a softmax over all experts; the top_k
// largest of score + bias are chosen, the lowest id first among equals. A weight is the score alone, divided by the sum of the
// chosen (in ascending order, at least the smallest normal float), times the scale. A logit or score that is no number counts as
// the largest float, and infinities as the largest of their sign, so every row has experts.
void route(const Ops &ops, const RouterRule &rule, const float *logits, const float *bias, int32_t *chosen, float *weights);

} // namespace pf
