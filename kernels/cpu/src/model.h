// The architecture that a packed file describes, with pointers into it.
#pragma once

#include "packed_file.h"

namespace pf {

enum class Attention : uint8_t { kFull, kWindow, kSkip };

struct Block {
    Attention attention = Attention::kFull;
    const float *attention_norm = nullptr, *feed_forward_norm = nullptr;
    Matrix qkv, out, gate_up, down;
};

struct Config {
    int vocab_size = 0, hidden_size = 0, num_blocks = 0, block_repeat = 1, num_heads = 0, num_kv_heads = 0, head_dim = 0;
    int ffn_size = 0, max_positions = 0, window = 0;
    float norm_eps = 0;
    bool qk_norm = false, tied = false;

    int executed() const { return num_blocks * block_repeat; }
    int query_size() const { return num_heads * head_dim; }
    int kv_size() const { return num_kv_heads * head_dim; }
};

constexpr int kMostHeadDim = 512;

} // namespace pf

struct pf_model {
    pf::PackedFile file;
    const pf::Ops *ops = nullptr;
    pf::Config config;
    pf::Buffer<pf::Block> blocks;
    pf::Matrix embed, head;
    pf::Buffer<int32_t> outputs;  // the ids of a trimmed head's rows, ascending; empty where a row is its id
    const float *norm = nullptr;
    const float *inverse_frequencies = nullptr;  // [head_dim / 2]

    pf_status read(const pf::Error &error);
    uint64_t decode_bytes() const;
    uint64_t layer_weights() const;

  private:
    pf_status read_config(const pf::Error &error);
    pf_status read_outputs(const pf::Error &error);
    pf_status read_block(int index, const pf::Error &error);
    pf_status matrix(const char *name, int rows, int k, pf::Matrix *out, const pf::Error &error) const;
    pf_status vector(const char *name, int size, const float **out, const pf::Error &error) const;
};
