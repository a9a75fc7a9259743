// One pass of a batch of tokens through the layers: which operation follows which, and how rows are shared out over threads.
#include "clock.h"

using pf::Attention;
using pf::Block;
using pf::Config;
using pf::Matrix;
using pf::Operation;

void pf_session::forward(const int32_t *tokens, int count) {
    embed(tokens, count);
    mixture.tokens += uint64_t(count);
    const Config &c = model->config;
    for (int i = 0; i < c.executed(); ++i) {
        const Block &block = model->blocks[size_t(i / c.block_repeat)];
        if (block.attention != Attention::kSkip) attention(block, caches_[size_t(i)], count);
        norm(block.feed_forward_norm, 0, count);
        if (block.experts != nullptr) experts(block, count);
        else feed_forward(block.feed_forward, count);
    }
}

void pf_session::embed(const int32_t *tokens, int count) {
    Clock clock(*this, pf::kEmbed);
    const Matrix &w = model->embed;
    for (int t = 0; t < count; ++t) {
        float *x = x_.data() + size_t(t) * size_t(w.k);
        const uint8_t *panel = w.panel(tokens[t] / pf::kPanel), *codes = panel + w.scale_bytes();
        size_t row = size_t(tokens[t] % pf::kPanel);
        if (w.encoding == Matrix::kInt8) {
            float scale;
            memcpy(&scale, panel + row * 4, 4);
            for (size_t i = 0; i < size_t(w.k); ++i) x[i] = float(int8_t(codes[i / 4 * 64 + row * 4 + i % 4])) * scale;
            continue;
        }
        for (size_t g = 0; g < size_t(w.groups()); ++g) {
            uint16_t half;
            memcpy(&half, panel + (g * pf::kPanel + row) * 2, 2);
            float scale = pf::half_to_float(half);
            for (size_t i = 0; i < 16; ++i) {  // byte i holds codes i and i + 4 of a run of 8
                uint8_t byte = codes[g * 256 + i / 4 * 64 + row * 4 + i % 4];
                float *run = x + g * pf::kGroup + i / 4 * 8 + i % 4;
                run[0] = float(int(byte & 15) - 8) * scale;
                run[4] = float(int(byte >> 4) - 8) * scale;
            }
        }
    }
}

void pf_session::norm(const float *weight, int first, int count) {
    Clock clock(*this, pf::kNorm);
    size_t n = size_t(model->config.hidden_size);
    pool.split(count, [&](int begin, int end, int) {
        for (int t = begin; t < end; ++t) {
            model->ops->rms_norm(x_.data() + size_t(first + t) * n, weight, int(n), model->config.norm_eps, normed_.data() + size_t(t) * n);
        }
    });
}

void pf_session::quantize(const float *x, int k, int count) {
    Clock clock(*this, pf::kQuantize);
    rows_ = row_memory_.rows(0, count, k);
    pool.split(count, [&](int begin, int end, int) {
        for (int t = begin; t < end; ++t) {
            size_t row = size_t(t) * size_t(k);
            model->ops->quantize_row(x + row, k, rows_.codes + row, rows_.scales + t, rows_.offsets + row / pf::kGroup);
        }
    });
    if (count == 1 || model->ops->pack_rows == nullptr) return;
    pool.split(count, [&](int begin, int end, int) { model->ops->pack_rows(rows_, begin, end); });
}

void pf_session::multiply(const Matrix &w, float *y, size_t stride, Operation operation) {
    Clock clock(*this, operation);
    pool.split(w.panels(), [&](int begin, int end, int) { model->ops->multiply(w, rows_, begin, end, y, stride); });
}

void pf_session::attention(const Block &block, pf::Cache &cache, int count) {
    const Config &c = model->config;
    norm(block.attention_norm, 0, count);
    quantize(normed_.data(), c.hidden_size, count);
    multiply(block.qkv, qkv_.data(), size_t(block.qkv.rows), pf::kQkv);
    rotate_and_store(block, cache, count);
    {
        Clock clock(*this, pf::kAttention);
        int group = c.num_heads / c.num_kv_heads, tiles = (count * group + pf::kQueryTile - 1) / pf::kQueryTile;
        float scale = 1.0f / __builtin_sqrtf(float(c.head_dim));
        size_t stride = size_t(block.qkv.rows), d = size_t(c.head_dim);
        pool.split(c.num_kv_heads * tiles, [&](int begin, int end, int thread) {
            pf::Query queries[pf::kQueryTile];
            for (int item = begin; item < end; ++item) {
                int kv_head = item / tiles, first = item % tiles * pf::kQueryTile;
                int rows = pf::smaller(pf::kQueryTile, count * group - first);
                for (int i = 0; i < rows; ++i) {
                    int t = (first + i) / group, head = kv_head * group + (first + i) % group, position = length + t;
                    int seen = block.attention == Attention::kWindow ? c.window : options.context;
                    queries[i] = {qkv_.data() + size_t(t) * stride + size_t(head) * d,
                                  mixed_.data() + (size_t(t) * size_t(c.num_heads) + size_t(head)) * d,
                                  pf::larger(0, position - seen + 1), position};
                }
                pf::KvRing ring = {cache.blocks + size_t(kv_head) * size_t(cache.count) * layout.block_bytes(), cache.count, layout};
                model->ops->attend(ring, queries, rows, scale, scores_.data() + scores_stride_ * size_t(thread));
            }
        });
    }
    quantize(mixed_.data(), c.query_size(), count);
    multiply(block.out, product_.data(), size_t(c.hidden_size), pf::kOut);
    model->ops->add(x_.data(), product_.data(), count * c.hidden_size);
}

void pf_session::rotate_and_store(const Block &block, const pf::Cache &cache, int count) {
    Clock clock(*this, pf::kRope);
    const Config &c = model->config;
    size_t d = size_t(c.head_dim);
    pool.split(count, [&](int begin, int end, int) {
        for (int t = begin; t < end; ++t) {
            int position = length + t;
            float *row = qkv_.data() + size_t(t) * size_t(block.qkv.rows);
            pf::Rope table = {cos_.data() + size_t(position) * d, sin_.data() + size_t(position) * d};
            for (int head = 0; head < c.num_heads + c.num_kv_heads; ++head) {
                float *one = row + size_t(head) * d;
                model->ops->rope(one, c.head_dim, table);
                if (c.qk_norm) model->ops->rms_norm(one, nullptr, c.head_dim, c.norm_eps, one);
            }
            const float *keys = row + c.query_size(), *values = keys + c.kv_size();
            for (int head = 0; head < c.num_kv_heads; ++head) {
                pf::KvRing ring = {cache.blocks + size_t(head) * size_t(cache.count) * layout.block_bytes(), cache.count, layout};
                model->ops->store_kv(ring, position, keys + size_t(head) * d, values + size_t(head) * d);
            }
        }
    });
}

void pf_session::feed_forward(const pf::FeedForward &w, int count) {
    const Config &c = model->config;
    quantize(normed_.data(), c.hidden_size, count);
    size_t ffn = size_t(w.down.k);
    multiply(w.gate_up, gate_up_.data(), 2 * ffn, pf::kGateUp);
    {
        Clock clock(*this, pf::kSwiglu);
        pool.split(count, [&](int begin, int end, int) {
            for (int t = begin; t < end; ++t) {
                const float *gate = gate_up_.data() + size_t(t) * 2 * ffn;
                model->ops->swiglu(gate, gate + ffn, int(ffn), normed_.data() + size_t(t) * ffn);
            }
        });
    }
    quantize(normed_.data(), int(ffn), count);
    multiply(w.down, product_.data(), size_t(c.hidden_size), pf::kDown);
    model->ops->add(x_.data(), product_.data(), count * c.hidden_size);
}

void pf_session::head(int first, int count, float *out) {
    norm(model->norm, first, count);
    quantize(normed_.data(), model->config.hidden_size, count);
    multiply(model->head, out, size_t(model->config.vocab_size), pf::kHead);
    if (model->outputs.size() > 0) {
        for (int t = 0; t < count; ++t) spread(out + size_t(t) * size_t(model->config.vocab_size));
    }
}

// Logits of a trimmed head's rows to their ids, minus infinity elsewhere. From the end: an id is never below its row.
void pf_session::spread(float *row) const {
    size_t left = model->outputs.size();
    for (int id = model->config.vocab_size - 1; id >= 0; --id) {
        bool has = left > 0 && model->outputs[left - 1] == id;
        row[id] = has ? row[--left] : -__builtin_inff();
    }
}
