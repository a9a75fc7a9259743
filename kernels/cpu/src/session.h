// One sequence on a model: its key/value cache, its scratch memory, its threads.
#pragma once

#include "model.h"
#include "threads.h"

namespace pf {

enum Operation { kEmbed, kNorm, kQuantize, kQkv, kRope, kAttention, kOut, kGateUp, kSwiglu, kDown, kHead, kRoute, kGather, kMix,
                 kOperations };

// A product that shares a region of the threads with others.
struct Job {
    const Matrix *w;
    Rows x;
    float *y;
    size_t stride;
    int64_t panel_cost() const { return int64_t(w->k) * (x.count + 4); }  // loading and taking apart is worth a few tokens
};

// Scratch of a layer of experts, and what is counted of them. A pair is a token and one of its experts; pairs are sorted by expert,
// and as many experts at once go through both products as fill about kPairs rows, so that what lies between stays in the cache.
struct Mixture {
    static constexpr int kPairs = 128;

    Buffer<float> logits;           // [tokens, experts]
    Buffer<int32_t> chosen;         // [tokens, top_k], ascending
    Buffer<float> weights;          // [tokens, top_k]
    Buffer<int32_t> begin;          // [experts + 1]: the pairs of each expert
    Buffer<int32_t> pair_token;     // [tokens * top_k]
    Buffer<float> pair_weight;
    Buffer<Job> jobs;               // [experts + 1]
    RowMemory pairs, shared;        // rounded rows of a group's pairs, and of the shared expert's second product
    Buffer<float> gate_up, out;     // of a group's pairs
    Buffer<float> activated;        // [threads, width]
    Buffer<uint64_t> hits;          // [moe_layers, experts]: pairs since the session's start
    uint64_t tokens = 0;            // that went through all layers
    uint64_t read_bytes = 0;        // of routed experts' matrices: each one that a batch needs, once a batch and layer

    bool allocate(const Config &config, int batch, int threads);
};

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

    pf::Mixture mixture;
    bool timed = false;
    double seconds[pf::kOperations] = {};

  private:
    class Clock;
    void forward(const int32_t *tokens, int count);
    void attention(const pf::Block &block, pf::Cache &cache, int count);
    void feed_forward(const pf::FeedForward &w, int count);
    void experts(const pf::Block &block, int count);
    void route(const pf::Block &block, int count);
    void sort_pairs(const pf::Block &block, int count);
    void gather(int first, int last);
    void activate(int first, int last, int shared_rows);
    void multiply_group(const pf::Block &block, int first, int last, int shared_rows, bool down);
    void run_jobs(int count, pf::Operation operation);
    void mix(int first, int last);
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
    pf::RowMemory row_memory_;
    pf::Buffer<uint8_t> kv_;
    pf::Buffer<pf::Cache> caches_;
    pf::Rows rows_;
    size_t scores_stride_ = 0;
};
