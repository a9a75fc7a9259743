// A layer of a mixture of experts for a batch of tokens: choose, sort the pairs of a token and an expert by expert, both products
// for several experts at once, add up. Tokens are rounded to INT8 once: an expert takes copies of their codes.
//
// Whatever the batch and the threads, a token's sum starts at the shared expert's output, or 0, and its experts are added with fused
// multiply-adds, ids ascending.
#include "clock.h"

using pf::Block;
using pf::Config;
using pf::Matrix;
using pf::Mixture;
using pf::Operation;
using pf::Rows;

bool pf::Mixture::allocate(const Config &c, int batch, int threads) {
    size_t n = size_t(batch), experts = size_t(c.router.experts), all = n * size_t(c.router.top_k), rows = larger(n, size_t(kPairs));
    return logits.allocate(n * experts) && chosen.allocate(all) && weights.allocate(all) && begin.allocate(experts + 1) &&
           pair_token.allocate(all) && pair_weight.allocate(all) && jobs.allocate(experts + 1) &&
           pairs.allocate(rows, size_t(larger(c.hidden_size, c.expert_size))) && shared.allocate(n, size_t(c.shared_size)) &&
           gate_up.allocate(rows * 2 * size_t(c.expert_size)) && out.allocate(rows * size_t(c.hidden_size)) &&
           activated.allocate(size_t(threads) * size_t(c.widest_ffn())) && hits.allocate(size_t(c.moe_layers()) * experts);
}

void pf_session::experts(const Block &block, int count) {
    const Config &c = model->config;
    route(block, count);
    sort_pairs(block, count);
    quantize(normed_.data(), c.hidden_size, count);
    if (c.shared_size == 0) memset(product_.data(), 0, size_t(count) * size_t(c.hidden_size) * sizeof(float));
    const pf::Buffer<int32_t> &begin = mixture.begin;
    for (int first = 0, last; first < c.router.experts; first = last) {
        for (last = first + 1; last < c.router.experts && begin[size_t(last) + 1] - begin[size_t(first)] <= Mixture::kPairs; ++last) {}
        int shared_rows = first == 0 && c.shared_size > 0 ? count : 0;  // in the same regions of the threads as the first group
        if (count > 1) gather(first, last);
        multiply_group(block, first, last, shared_rows, false);
        activate(first, last, shared_rows);
        multiply_group(block, first, last, shared_rows, true);
        mix(first, last);
    }
    model->ops->add(x_.data(), product_.data(), count * c.hidden_size);
}

void pf_session::route(const Block &block, int count) {
    Clock clock(*this, pf::kRoute);
    const Config &c = model->config;
    Mixture &m = mixture;
    size_t n = size_t(c.hidden_size), experts = size_t(c.router.experts), k = size_t(c.router.top_k);
    if (count == 1) {
        pool.split(c.router.experts, [&](int begin, int end, int) {
            model->ops->router(normed_.data(), block.router + size_t(begin) * n, 1, end - begin, c.hidden_size, m.logits.data() + begin);
        });
    } else {
        pool.split(count, [&](int begin, int end, int) {
            const float *rows = normed_.data() + size_t(begin) * n;
            model->ops->router(rows, block.router, end - begin, c.router.experts, c.hidden_size, m.logits.data() + size_t(begin) * experts);
        });
    }
    pool.split(count, [&](int begin, int end, int) {
        for (size_t t = size_t(begin); t < size_t(end); ++t) {
            const float *logits = m.logits.data() + t * experts;
            pf::route(*model->ops, c.router, logits, block.router_bias, m.chosen.data() + t * k, m.weights.data() + t * k);
        }
    });
}

// A counting sort: within an expert tokens stay in order.
void pf_session::sort_pairs(const Block &block, int count) {
    Clock clock(*this, pf::kRoute);
    Mixture &m = mixture;
    size_t experts = size_t(model->config.router.experts), k = size_t(model->config.router.top_k), pairs = size_t(count) * k;
    memset(m.begin.data(), 0, (experts + 1) * sizeof(int32_t));
    for (size_t i = 0; i < pairs; ++i) ++m.begin[size_t(m.chosen[i]) + 1];
    uint64_t *hits = m.hits.data() + (block.experts - model->experts.data());
    for (size_t e = 0; e < experts; ++e) {
        int32_t rows = m.begin[e + 1];
        hits[e] += uint64_t(rows);
        if (rows > 0) m.read_bytes += block.experts[e].bytes();
        m.begin[e + 1] = m.begin[e] + rows;
    }
    // Filling moves each expert's begin to its end, which is the next one's begin: back by one place, they are right again.
    for (size_t i = 0; i < pairs; ++i) {
        size_t at = size_t(m.begin[size_t(m.chosen[i])]++);
        m.pair_token[at] = int32_t(i / k);
        m.pair_weight[at] = m.weights[i];
    }
    for (size_t e = experts; e > 0; --e) m.begin[e] = m.begin[e - 1];
    m.begin[0] = 0;
}

// The rounded rows of the tokens of experts [first, last), expert by expert, as their products want them.
void pf_session::gather(int first, int last) {
    Clock clock(*this, pf::kGather);
    Mixture &m = mixture;
    size_t k = size_t(model->config.hidden_size), groups = k / pf::kGroup;
    pool.split(last - first, [&](int begin, int end, int) {
        for (int e = first + begin; e < first + end; ++e) {
            int from = m.begin[size_t(e)], count = m.begin[size_t(e) + 1] - from;
            Rows rows = m.pairs.rows(from - m.begin[size_t(first)], count, int(k));
            for (size_t i = 0; i < size_t(count); ++i) {
                size_t token = size_t(m.pair_token[size_t(from) + i]);
                memcpy(rows.codes + i * k, rows_.codes + token * k, k);
                memcpy(rows.offsets + i * groups, rows_.offsets + token * groups, groups * sizeof(int32_t));
                rows.scales[i] = rows_.scales[token];
            }
            if (count > 1 && model->ops->pack_rows != nullptr) model->ops->pack_rows(rows, 0, count);
        }
    });
}

// One of the two products of experts [first, last), and of the shared expert where it has rows.
void pf_session::multiply_group(const Block &block, int first, int last, int shared_rows, bool down) {
    Mixture &m = mixture;
    int jobs = 0, base = m.begin[size_t(first)];
    auto add = [&](const pf::FeedForward &w, Rows x, float *gate_up, float *out) {
        const Matrix &matrix = down ? w.down : w.gate_up;
        m.jobs[size_t(jobs++)] = {&matrix, x, down ? out : gate_up, size_t(matrix.rows)};
    };
    if (shared_rows > 0) {
        Rows x = down ? m.shared.rows(0, shared_rows, model->config.shared_size) : rows_;
        add(block.feed_forward, x, gate_up_.data(), product_.data());
    }
    for (int e = first; e < last; ++e) {
        int from = m.begin[size_t(e)], count = m.begin[size_t(e) + 1] - from, at = from - base;
        if (count == 0) continue;
        const pf::FeedForward &w = block.experts[e];
        // A token alone is its own batch: nothing was gathered.
        Rows x = !down && rows_.count == 1 ? rows_ : m.pairs.rows(at, count, down ? w.down.k : w.gate_up.k);
        add(w, x, m.gate_up.data() + size_t(at) * size_t(w.gate_up.rows), m.out.data() + size_t(at) * size_t(w.down.rows));
    }
    run_jobs(jobs, down ? pf::kDown : pf::kGateUp);
}

// Threads share the panels of all jobs, by what they cost.
void pf_session::run_jobs(int count, Operation operation) {
    Clock clock(*this, operation);
    const pf::Job *jobs = mixture.jobs.data();
    int64_t total = 0;
    for (int i = 0; i < count; ++i) total += jobs[i].panel_cost() * jobs[i].w->panels();
    pool.run([&](int index) {
        int64_t from = total * index / pool.threads(), to = total * (index + 1) / pool.threads(), at = 0;
        for (int i = 0; i < count; ++i) {
            const pf::Job &job = jobs[i];
            int64_t cost = job.panel_cost(), panels = job.w->panels();
            auto panel_at = [&](int64_t limit) {  // the first panel that begins at this cost or later
                return int(pf::smaller(panels, pf::larger<int64_t>(0, (limit - at + cost - 1) / cost)));
            };
            int begin = panel_at(from), end = panel_at(to);
            if (begin < end) model->ops->multiply(*job.w, job.x, begin, end, job.y, job.stride);
            at += cost * panels;
        }
    });
}

// SwiGLU of what the first product gave, rounded for the second.
void pf_session::activate(int first, int last, int shared_rows) {
    const Config &c = model->config;
    Mixture &m = mixture;
    int base = m.begin[size_t(first)], pairs = m.begin[size_t(last)] - base;
    {
        Clock clock(*this, pf::kSwiglu);
        Rows own = m.pairs.rows(0, pairs, c.expert_size), shared = m.shared.rows(0, shared_rows, c.shared_size);
        pool.split(pairs + shared_rows, [&](int begin, int end, int thread) {
            float *scratch = m.activated.data() + size_t(thread) * size_t(c.widest_ffn());
            for (int i = begin; i < end; ++i) {
                const Rows &to = i < pairs ? own : shared;
                size_t row = size_t(i < pairs ? i : i - pairs), k = size_t(to.k);
                const float *gate = (i < pairs ? m.gate_up.data() : gate_up_.data()) + row * 2 * k;
                model->ops->swiglu(gate, gate + k, to.k, scratch);
                model->ops->quantize_row(scratch, to.k, to.codes + row * k, to.scales + row, to.offsets + row * k / pf::kGroup);
            }
        });
    }
    if (rows_.count == 1 || model->ops->pack_rows == nullptr) return;
    Clock clock(*this, pf::kQuantize);
    pool.split(last - first, [&](int begin, int end, int) {
        for (int e = first + begin; e < first + end; ++e) {
            int from = m.begin[size_t(e)], count = m.begin[size_t(e) + 1] - from;
            Rows rows = m.pairs.rows(from - base, count, c.expert_size);
            if (count > 1) model->ops->pack_rows(rows, 0, count);
        }
    });
    pool.split(shared_rows, [&](int begin, int end, int) {
        Rows rows = m.shared.rows(0, shared_rows, c.shared_size);
        model->ops->pack_rows(rows, begin, end);
    });
}

// Outputs of experts [first, last) to their tokens' sums. Threads share the columns, so that a sum is one thread's.
void pf_session::mix(int first, int last) {
    Clock clock(*this, pf::kMix);
    Mixture &m = mixture;
    size_t n = size_t(model->config.hidden_size), base = size_t(m.begin[size_t(first)]), end = size_t(m.begin[size_t(last)]);
    pool.split(int(n / 16), [&](int from, int to, int) {
        size_t column = size_t(from) * 16;
        for (size_t i = base; i < end; ++i) {
            float *sum = product_.data() + size_t(m.pair_token[i]) * n + column;
            model->ops->add_scaled(sum, m.out.data() + (i - base) * n + column, m.pair_weight[i], (to - from) * 16);
        }
    });
}
