// What a packed file says of a mixture of experts, and the tensors of its layers. A stranger may have written it.
#include <float.h>

#include "model.h"

using pf::Error;
using pf::Json;

pf_status pf_model::read_moe(const Error &error) {
    const Json &json = file.json();
    int moe = json.find(json.find(0, "model"), "moe");
    if (moe < 0) return PF_OK;
    if (!json.is(moe, Json::kObject)) return error.set(PF_BAD_FILE, "model.moe: not an object");
    pf::RouterRule &rule = config.router;
    const Field fields[] = {
        {"num_experts", &rule.experts, 1, pf::kMostExperts, 1},   {"top_k", &rule.top_k, 1, pf::kMostChosen, 1},
        {"expert_size", &config.expert_size, 32, 1u << 19, 32},  {"shared_size", &config.shared_size, 0, 1u << 19, 32},
        {"dense_layers", &config.dense_layers, 0, uint64_t(config.num_blocks), 1},
    };
    pf_status status = read_fields(moe, "model.moe", fields, sizeof fields / sizeof fields[0], error);
    if (status == PF_OK) status = read_flag(moe, "model.moe", "normalize", &rule.normalize, error);
    if (status != PF_OK) return status;
    if (rule.top_k > rule.experts) {
        return error.set(PF_BAD_FILE, "model.moe.top_k: %d is more than num_experts, %d", rule.top_k, rule.experts);
    }
    int score = json.find(moe, "score");
    rule.softmax = json.equals(score, "softmax");
    if (!rule.softmax && !json.equals(score, "sigmoid")) return error.set(PF_BAD_FILE, "model.moe.score: none of sigmoid, softmax");
    double scale = 0;
    if (!json.number(json.find(moe, "route_scale"), &scale) || !(float(scale) > 0 && scale <= double(FLT_MAX))) {
        return error.set(PF_BAD_FILE, "model.moe.route_scale: missing, or not a positive number");
    }
    rule.scale = float(scale);
    // Before memory is asked for: every expert is two of the file's tensors.
    size_t count = size_t(config.moe_layers()) * size_t(rule.experts);
    if (2 * count > file.tensors()) {
        return error.set(PF_BAD_FILE, "model.moe.num_experts: %d in %d layers are more than the file has tensors for", rule.experts,
                         config.moe_layers());
    }
    return experts.allocate(count) ? PF_OK : error.set(PF_NO_MEMORY, "no memory for %zu experts", count);
}

pf_status pf_model::read_experts(int index, const Error &error) {
    pf::Block &block = blocks[size_t(index)];
    int count = config.router.experts;
    char name[64];
    auto named = [&](const char *part) {
        snprintf(name, sizeof name, "blocks.%d.feed_forward%s", index, part);
        return name;
    };
    pf_status status = floats(named(".router"), count, config.hidden_size, &block.router, error);
    if (status == PF_OK) status = vector(named(".router_bias"), count, &block.router_bias, error);
    if (status != PF_OK) return status;
    // No answer of a router that is no number could be explained to anybody, so it is refused here.
    for (size_t i = 0; i < size_t(count) * size_t(config.hidden_size + 1); ++i) {
        bool is_bias = i < size_t(count);
        float value = is_bias ? block.router_bias[i] : block.router[i - size_t(count)];
        if (!(__builtin_fabsf(value) <= FLT_MAX)) {
            return error.set(PF_BAD_FILE, "tensor %s: a value is infinite or no number", named(is_bias ? ".router_bias" : ".router"));
        }
    }
    if (config.shared_size > 0) status = feed_forward(named(""), config.shared_size, &block.feed_forward, error);
    pf::FeedForward *own = experts.data() + size_t(index - config.dense_layers) * size_t(count);
    block.experts = own;
    for (int e = 0; e < count && status == PF_OK; ++e) {
        snprintf(name, sizeof name, "blocks.%d.experts.%d", index, e);
        status = feed_forward(name, config.expert_size, own + e, error);
        if (status == PF_OK && own[e].down.data != own[e].gate_up.data + own[e].gate_up.bytes()) {
            status = error.set(PF_BAD_FILE, "tensor %s.down: offset: it does not follow gate_up, an expert is one record", name);
        }
    }
    return status;
}

pf_status pf_model::feed_forward(const char *prefix, int width, pf::FeedForward *out, const Error &error) const {
    char name[80];
    snprintf(name, sizeof name, "%s.gate_up", prefix);
    pf_status status = matrix(name, 2 * width, config.hidden_size, &out->gate_up, error);
    if (status != PF_OK) return status;
    snprintf(name, sizeof name, "%s.down", prefix);
    return matrix(name, config.hidden_size, width, &out->down, error);
}
