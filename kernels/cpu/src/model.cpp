#include "model.h"

namespace {

using pf::Attention;
using pf::Error;
using pf::Json;

} // namespace

pf_status pf_model::read_fields(int object, const char *path, const Field *fields, size_t count, const Error &error) const {
    for (size_t i = 0; i < count; ++i) {
        const Field &field = fields[i];
        uint64_t value = 0;
        if (!file.json().integer(file.json().find(object, field.name), &value) || value < field.least || value > field.most) {
            return error.set(PF_BAD_FILE, "%s.%s: missing, or not a whole number from %llu to %llu", path, field.name,
                             static_cast<unsigned long long>(field.least), static_cast<unsigned long long>(field.most));
        }
        *field.value = int(value);
        if (field.multiple > 1 && *field.value % field.multiple != 0) {
            return error.set(PF_BAD_FILE, "%s.%s: %d is not a multiple of %d", path, field.name, *field.value, field.multiple);
        }
    }
    return PF_OK;
}

pf_status pf_model::read_flag(int object, const char *path, const char *name, bool *value, const Error &error) const {
    int node = file.json().find(object, name);
    if (!file.json().is(node, Json::kTrue) && !file.json().is(node, Json::kFalse)) {
        return error.set(PF_BAD_FILE, "%s.%s: missing, or not true or false", path, name);
    }
    *value = file.json().is(node, Json::kTrue);
    return PF_OK;
}

pf_status pf_model::read(const Error &error) {
    pf_status status = read_config(error);
    if (status == PF_OK) status = read_outputs(error);
    if (status == PF_OK) status = read_moe(error);
    if (status != PF_OK) return status;
    int head_rows = outputs.size() > 0 ? int(outputs.size()) : config.vocab_size;
    if (!blocks.allocate(size_t(config.num_blocks))) return error.set(PF_NO_MEMORY, "no memory for %d blocks", config.num_blocks);
    for (int i = 0; i < config.num_blocks && status == PF_OK; ++i) status = read_block(i, error);
    if (status == PF_OK) status = matrix("embed", config.vocab_size, config.hidden_size, &embed, error);
    if (status == PF_OK && !config.tied) status = matrix("head", head_rows, config.hidden_size, &head, error);
    if (status == PF_OK && config.tied) head = embed;
    if (status == PF_OK) status = vector("norm", config.hidden_size, &norm, error);
    if (status == PF_OK) status = vector("rope.inverse_frequencies", config.head_dim / 2, &inverse_frequencies, error);
    return status;
}

pf_status pf_model::read_config(const Error &error) {
    const Json &json = file.json();
    int model = json.find(0, "model");
    if (!json.is(model, Json::kObject)) return error.set(PF_BAD_FILE, "model: missing from the metadata");
    const Field fields[] = {
        {"vocab_size", &config.vocab_size, 1, 1u << 24, 1},   {"hidden_size", &config.hidden_size, 32, 1u << 18, 32},
        {"num_layers", &config.num_blocks, 1, 4096, 1},       {"block_repeat", &config.block_repeat, 1, 16, 1},
        {"num_heads", &config.num_heads, 1, 4096, 1},         {"num_kv_heads", &config.num_kv_heads, 1, 4096, 1},
        {"head_dim", &config.head_dim, 32, pf::kMostHeadDim, 32}, {"ffn_size", &config.ffn_size, 32, 1u << 19, 32},
        {"max_positions", &config.max_positions, 1, 1u << 24, 1}, {"window", &config.window, 1, 1u << 24, 1},
    };
    pf_status status = read_fields(model, "model", fields, sizeof fields / sizeof fields[0], error);
    if (status != PF_OK) return status;
    if (config.num_heads % config.num_kv_heads != 0) {
        return error.set(PF_BAD_FILE, "model.num_heads: %d is not a multiple of num_kv_heads, %d", config.num_heads, config.num_kv_heads);
    }
    if (int64_t(config.num_heads) * config.head_dim > (1 << 19)) return error.set(PF_BAD_FILE, "model.num_heads: absurdly many");
    double eps = 0;
    if (!json.number(json.find(model, "norm_eps"), &eps) || !(float(eps) > 0 && eps < 1)) {
        return error.set(PF_BAD_FILE, "model.norm_eps: missing, or not between 0 and 1");
    }
    config.norm_eps = float(eps);
    status = read_flag(model, "model", "qk_norm", &config.qk_norm, error);
    return status == PF_OK ? read_flag(model, "model", "tie_embeddings", &config.tied, error) : status;
}

pf_status pf_model::read_outputs(const Error &error) {
    const Json &json = file.json();
    int list = json.find(json.find(0, "model"), "output_tokens");
    if (list < 0) return PF_OK;
    int count = json.size(list);
    if (!json.is(list, Json::kArray) || count < 1 || count > config.vocab_size || config.tied) {
        return error.set(PF_BAD_FILE, "model.output_tokens: not a list of 1 to %d ids of an untied head", config.vocab_size);
    }
    if (!outputs.allocate(size_t(count))) return error.set(PF_NO_MEMORY, "no memory for %d ids", count);
    uint64_t least = 0;
    for (int i = 0, node = json.first(list); i < count; ++i, node = json.after(node)) {
        uint64_t id = 0;
        if (!json.integer(node, &id) || id < least || id >= uint64_t(config.vocab_size)) {
            return error.set(PF_BAD_FILE, "model.output_tokens: id %d is not a whole number, above the one before, below %d", i, config.vocab_size);
        }
        outputs[size_t(i)] = int32_t(id);
        least = id + 1;
    }
    return PF_OK;
}

pf_status pf_model::read_block(int index, const Error &error) {
    const Json &json = file.json();
    pf::Block &block = blocks[size_t(index)];
    int kinds = json.find(json.find(0, "model"), "attention");
    if (!json.is(kinds, Json::kArray) || json.size(kinds) != config.num_blocks) {
        return error.set(PF_BAD_FILE, "model.attention: not a list of %d kinds", config.num_blocks);
    }
    int kind = json.first(kinds);
    for (int i = 0; i < index; ++i) kind = json.after(kind);
    if (json.equals(kind, "full")) block.attention = Attention::kFull;
    else if (json.equals(kind, "window")) block.attention = Attention::kWindow;
    else if (json.equals(kind, "skip")) block.attention = Attention::kSkip;
    else return error.set(PF_BAD_FILE, "model.attention: layer %d is none of full, window, skip", index);

    char name[64];
    auto named = [&](const char *part) {
        snprintf(name, sizeof name, "blocks.%d.%s", index, part);
        return name;
    };
    int hidden = config.hidden_size, query = config.query_size();
    pf_status status = PF_OK;
    if (block.attention != Attention::kSkip) {
        status = vector(named("attention_norm"), hidden, &block.attention_norm, error);
        if (status == PF_OK) status = matrix(named("attention.qkv"), query + 2 * config.kv_size(), hidden, &block.qkv, error);
        if (status == PF_OK) status = matrix(named("attention.out"), hidden, query, &block.out, error);
    }
    if (status == PF_OK) status = vector(named("feed_forward_norm"), hidden, &block.feed_forward_norm, error);
    if (status != PF_OK) return status;
    if (config.moe_layers() > 0 && index >= config.dense_layers) return read_experts(index, error);
    return feed_forward(named("feed_forward"), config.ffn_size, &block.feed_forward, error);
}

pf_status pf_model::matrix(const char *name, int rows, int k, pf::Matrix *out, const Error &error) const {
    const pf::Tensor *tensor = file.find(name);
    if (tensor == nullptr) return error.set(PF_BAD_FILE, "tensor %s: missing", name);
    if (tensor->encoding != pf::Tensor::kInt4 && tensor->encoding != pf::Tensor::kInt8) {
        return error.set(PF_BAD_FILE, "tensor %s: encoding: not one of a matrix", name);
    }
    if (tensor->rows != uint32_t(rows) || tensor->columns != uint32_t(k)) {
        return error.set(PF_BAD_FILE, "tensor %s: shape: %u x %u; the model says %d x %d", name, tensor->rows, tensor->columns, rows, k);
    }
    out->encoding = tensor->encoding == pf::Tensor::kInt4 ? pf::Matrix::kInt4 : pf::Matrix::kInt8;
    out->data = file.data(*tensor);
    out->rows = rows;
    out->k = k;
    return PF_OK;
}

pf_status pf_model::floats(const char *name, int rows, int size, const float **out, const Error &error) const {
    const pf::Tensor *tensor = file.find(name);
    if (tensor == nullptr) return error.set(PF_BAD_FILE, "tensor %s: missing", name);
    if (tensor->encoding != pf::Tensor::kF32 || tensor->rows != uint32_t(rows) || tensor->columns != uint32_t(size)) {
        return error.set(PF_BAD_FILE, "tensor %s: shape: not %d x %d floats", name, rows, size);
    }
    *out = reinterpret_cast<const float *>(file.data(*tensor));
    return PF_OK;
}

uint64_t pf_model::decode_bytes() const {
    uint64_t bytes = head.bytes();
    for (int i = 0; i < config.num_blocks; ++i) {
        const pf::Block &block = blocks[size_t(i)];
        uint64_t layer = block.feed_forward.bytes() + block.qkv.bytes() + block.out.bytes();
        if (block.experts != nullptr) {
            layer += uint64_t(config.router.top_k) * block.experts[0].bytes();
            layer += uint64_t(config.router.experts) * uint64_t(config.hidden_size) * sizeof(float);
        }
        bytes += layer * uint64_t(config.block_repeat);
    }
    return bytes;
}

uint64_t pf_model::layer_weights() const {
    uint64_t weights = 0;
    for (int i = 0; i < config.num_blocks; ++i) {
        const pf::Block &block = blocks[size_t(i)];
        uint64_t layer = block.feed_forward.weights() + block.qkv.weights() + block.out.weights();
        if (block.experts != nullptr) layer += uint64_t(config.router.top_k) * block.experts[0].weights();
        weights += layer * uint64_t(config.block_repeat);
    }
    return weights;
}

extern "C" {

pf_status pf_model_open(const char *path, int32_t isa, int32_t verify, pf_model **model, char *text, size_t size) {
    Error error(text, size);
    *model = nullptr;
    const pf::Ops *ops = isa < 0 ? pf::default_ops() : pf::ops_at(isa);
    if (ops == nullptr || !ops->supported()) {
        char here[128] = "";
        for (int i = 0; i < pf::ops_count(); ++i) {
            if (!pf::ops_at(i)->supported()) continue;
            size_t used = strlen(here);
            snprintf(here + used, sizeof here - used, "%s%s", used == 0 ? "" : ", ", pf::ops_at(i)->name);
        }
        if (isa >= 0) return error.set(PF_BAD_ARGUMENT, "isa=%d; this machine has %s", isa, here);
        return error.set(PF_BAD_ARGUMENT, "POCKETFORGE_ISA=%.64s; this machine has %s", getenv("POCKETFORGE_ISA"), here);
    }
    void *memory = calloc(1, sizeof(pf_model));
    if (memory == nullptr) return error.set(PF_NO_MEMORY, "no memory for a model");
    pf_model *made = new (memory) pf_model;
    made->ops = ops;
    pf_status status = made->file.open(path, verify != 0, error);
    if (status == PF_OK) status = made->read(error);
    if (status != PF_OK) {
        pf_model_close(made);
        return status;
    }
    *model = made;
    return PF_OK;
}

void pf_model_close(pf_model *model) {
    if (model == nullptr) return;
    model->~pf_model();
    free(model);
}

void pf_model_get_info(const pf_model *model, pf_model_info *info) {
    const pf::Config &c = model->config;
    *info = {c.vocab_size, c.hidden_size,   c.num_blocks,       c.executed(),        c.num_heads, c.num_kv_heads, c.head_dim,
             c.ffn_size,   c.max_positions, model->file.size(), model->decode_bytes(), model->layer_weights(),
             c.router.experts, c.router.top_k, c.moe_layers(), c.moe_layers() > 0 ? model->experts[0].bytes() : 0};
}

const char *pf_model_isa(const pf_model *model) { return model->ops->name; }

const char *pf_model_metadata(const pf_model *model, size_t *length) {
    *length = model->file.metadata_bytes();
    return model->file.metadata();
}

const void *pf_model_tensor(const pf_model *model, const char *name, size_t *bytes) {
    const pf::Tensor *tensor = model->file.find(name);
    if (tensor == nullptr) return nullptr;
    *bytes = size_t(tensor->bytes);
    return model->file.data(*tensor);
}

const char *pf_version(void) { return "1"; }
int32_t pf_isa_count(void) { return pf::ops_count(); }
const char *pf_isa_name(int32_t index) { return pf::ops_at(index) == nullptr ? nullptr : pf::ops_at(index)->name; }
int32_t pf_isa_supported(int32_t index) { return pf::ops_at(index) != nullptr && pf::ops_at(index)->supported(); }
int32_t pf_isa_default(void) {
    for (int32_t i = 0; i < pf::ops_count(); ++i) {
        if (pf::ops_at(i) == pf::default_ops()) return i;
    }
    return -1;
}

} // extern "C"
