// One sequence on a model: its key/value cache, its scratch memory, its threads.
#pragma once

#include "model.h"
#include "threads.h"

namespace pf {

enum Operation { kEmbed, kNorm, kQuantize, kQkv, kRope, kAttention, kOut, kGateUp, kSwiglu, kDown, kHead, kOperations };

struct Cache {
    uint8_t *blocks = nullptr;  // [num_kv_heads][count][block_bytes]; null for a layer without attention
    int count = 0;
};

} // namespace pf

struct pf_session {
    const pf_model *model = nullptr;
    pf_session_options options = {};
    pf::Pool pool;
    int length = 0;
    pf::KvLayout layout;
    uint64_t kv_bytes = 0;

    pf_status create(const pf::Error &error);
    uint64_t kv_read_bytes() const;
    pf_status eval(const int32_t *tokens, const int32_t *labels, int count, bool all, float *logits, float *nll, const pf::Error &error);

    bool timed = false;
    double seconds[pf::kOperations] = {};

  private:
    class Clock;
    void forward(const int32_t *tokens, int count);
    void attention(const pf::Block &block, pf::Cache &cache, int count);
    void feed_forward(const pf::Block &block, int count);
    void rotate_and_store(const pf::Block &block, const pf::Cache &cache, int count);
    void embed(const int32_t *tokens, int count);
    void norm(const float *weight, int first, int count);
    void quantize(const float *x, int k, int count);
    void multiply(const pf::Matrix &w, float *y, size_t stride, pf::Operation operation);
    void head(int first, int count, float *out);
    void spread(float *row) const;
    void fill_rope();

    pf::Buffer<float> cos_, sin_;            // [context, head_dim]
    pf::Buffer<float> x_, normed_, qkv_, mixed_, gate_up_, product_, logits_, scores_;
    pf::Buffer<int8_t> codes_, packed_;
    pf::Buffer<int32_t> offsets_, packed_offsets_;
    pf::Buffer<float> scales_;
    pf::Buffer<uint8_t> kv_;
    pf::Buffer<pf::Cache> caches_;
    pf::Rows rows_;
    size_t scores_stride_ = 0;
};
