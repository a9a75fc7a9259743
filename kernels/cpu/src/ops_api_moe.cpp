// The parts of a mixture of experts over the C interface.
#include "routing.h"

extern "C" {

pf_status pf_op_router(const float *x, const float *weight, int32_t count, int32_t n, int32_t experts, float *logits) {
    const pf::Ops *ops = pf::default_ops();
    if (ops == nullptr || count < 0 || n < 16 || n % 16 != 0 || experts < 1 || experts > pf::kMostExperts) return PF_BAD_ARGUMENT;
    ops->router(x, weight, count, experts, n, logits);
    return PF_OK;
}

pf_status pf_op_route(const float *logits, const float *bias, int32_t count, int32_t experts, int32_t top_k, int32_t softmax,
                      int32_t normalize, float scale, int32_t *chosen, float *weights) {
    const pf::Ops *ops = pf::default_ops();
    if (ops == nullptr || count < 0 || experts < 1 || experts > pf::kMostExperts || top_k < 1 || top_k > pf::smaller(experts, pf::kMostChosen)) {
        return PF_BAD_ARGUMENT;
    }
    pf::RouterRule rule = {experts, top_k, softmax != 0, normalize != 0, scale};
    for (size_t t = 0; t < size_t(count); ++t) {
        pf::route(*ops, rule, logits + t * size_t(experts), bias, chosen + t * size_t(top_k), weights + t * size_t(top_k));
    }
    return PF_OK;
}

pf_status pf_op_mix(const float *first, const float *rows, const float *weights, int32_t count, int32_t k, int32_t n, float *out) {
    const pf::Ops *ops = pf::default_ops();
    if (ops == nullptr || count < 0 || k < 1 || n < 16 || n % 16 != 0) return PF_BAD_ARGUMENT;
    for (size_t t = 0; t < size_t(count); ++t) {
        size_t width = size_t(n);
        if (first != nullptr) memcpy(out + t * width, first + t * width, width * sizeof(float));
        else memset(out + t * width, 0, width * sizeof(float));
        for (size_t i = t * size_t(k); i < (t + 1) * size_t(k); ++i) ops->add_scaled(out + t * width, rows + i * width, weights[i], n);
    }
    return PF_OK;
}

} // extern "C"
