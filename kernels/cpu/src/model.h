// The architecture that a packed file describes, with pointers into it.
#pragma once

#include "packed_file.h"
#include "routing.h"

namespace pf {

enum class Attention : uint8_t { kFull, kWindow, kSkip };

struct FeedForward {
    Matrix gate_up, down;
    uint64_t bytes() const { return gate_up.bytes() + down.bytes(); }
    uint64_t weights() const { return gate_up.weights() + down.weights(); }
};

struct Block {
    Attention attention = Attention::kFull;
    const float *attention_norm = nullptr, *feed_forward_norm = nullptr;
    Matrix qkv, out;
    FeedForward feed_forward;              // with experts: the shared one, without rows where there is none
    const FeedForward *experts = nullptr;  // [num_experts]; null for a dense layer
    const float *router = nullptr, *router_bias = nullptr;  // [num_experts, hidden_size], [num_experts]
};

struct Config {
    int vocab_size = 0, hidden_size = 0, num_blocks = 0, block_repeat = 1, num_heads = 0, num_kv_heads = 0, head_dim = 0;
    int ffn_size = 0, max_positions = 0, window = 0;
    float norm_eps = 0;
    bool qk_norm = false, tied = false;
    RouterRule router;  // without experts: a dense model
    int expert_size = 0, shared_size = 0, dense_layers = 0;

    int executed() const { return num_blocks * block_repeat; }
    int query_size() const { return num_heads * head_dim; }
    int kv_size() const { return num_kv_heads * head_dim; }
    int moe_layers() const { return router.experts > 0 ? num_blocks - dense_layers : 0; }
    int widest_ffn() const { return larger(ffn_size, larger(expert_size, shared_size)); }
};

constexpr int kMostHeadDim = 512;

} // namespace pf

struct pf_model {
    pf::PackedFile file;
    const pf::Ops *ops = nullptr;
    pf::Config config;
    pf::Buffer<pf::Block> blocks;
    pf::Buffer<pf::FeedForward> experts;  // [moe_layers, num_experts]
    pf::Matrix embed, head;
    pf::Buffer<int32_t> outputs;  // the ids of a trimmed head's rows, ascending; empty where a row is its id
    const float *norm = nullptr;
    const float *inverse_frequencies = nullptr;  // [head_dim / 2]

    pf_status read(const pf::Error &error);
    uint64_t decode_bytes() const;  // of the routed experts, only those that take part in a token
    uint64_t layer_weights() const;

  private:
    struct Field {
        const char *name;
        int *value;
        uint64_t least, most;
        int multiple;  // of which the value is one
    };
    pf_status read_fields(int object, const char *path, const Field *fields, size_t count, const pf::Error &error) const;
    pf_status read_flag(int object, const char *path, const char *name, bool *value, const pf::Error &error) const;
    pf_status read_config(const pf::Error &error);
    pf_status read_outputs(const pf::Error &error);
    pf_status read_moe(const pf::Error &error);
    pf_status read_block(int index, const pf::Error &error);
    pf_status read_experts(int index, const pf::Error &error);
    pf_status feed_forward(const char *prefix, int width, pf::FeedForward *out, const pf::Error &error) const;
    pf_status matrix(const char *name, int rows, int k, pf::Matrix *out, const pf::Error &error) const;
    pf_status floats(const char *name, int rows, int size, const float **out, const pf::Error &error) const;
    pf_status vector(const char *name, int size, const float **out, const pf::Error &error) const { return floats(name, 1, size, out, error); }
};
