// A sequence on a model: what it allocates, what it refuses, and the C interface to it. The computation is in forward.cpp.
#include "session.h"

using pf::Attention;
using pf::Config;
using pf::Error;

namespace {

constexpr int kHeadTile = 12;  // tokens whose whole logits exist at once

// Sine and cosine in double precision without libm: reduced by multiples of pi / 2, then their series.
void sine_cosine(double x, double *sine, double *cosine) {
    if (!(x > -1e9 && x < 1e9)) {  // frequencies that no model has: whatever the answer, no conversion may overflow
        *sine = 0.0;
        *cosine = 1.0;
        return;
    }
    double turns = x * 0.63661977236758134308;
    int64_t k = int64_t(turns + (turns < 0 ? -0.5 : 0.5));
    double r = __builtin_fma(double(k), -1.57079632679489655800, x);
    r = __builtin_fma(double(k), -6.12323399573676603587e-17, r);
    double s = 0, c = 0, z = r * r;
    const double sines[] = {-1.0 / 1307674368000.0, 1.0 / 6227020800.0, -1.0 / 39916800.0, 1.0 / 362880.0,
                            -1.0 / 5040.0,          1.0 / 120.0,        -1.0 / 6.0,        1.0};
    const double cosines[] = {-1.0 / 87178291200.0, 1.0 / 479001600.0, -1.0 / 3628800.0, 1.0 / 40320.0,
                              -1.0 / 720.0,         1.0 / 24.0,        -0.5,             1.0};
    for (int i = 0; i < 8; ++i) {
        s = __builtin_fma(s, z, sines[i]);
        c = __builtin_fma(c, z, cosines[i]);
    }
    s *= r;
    switch (k & 3) {
    case 0: *sine = s, *cosine = c; break;
    case 1: *sine = c, *cosine = -s; break;
    case 2: *sine = -s, *cosine = -c; break;
    default: *sine = -c, *cosine = s; break;
    }
}

} // namespace

pf_status pf_session::create(const Error &error) {
    const Config &c = model->config;
    if (options.context < 1 || options.context > c.max_positions) {
        return error.set(PF_BAD_ARGUMENT, "context=%d; expected 1 to the model's max_positions, %d", options.context, c.max_positions);
    }
    if (options.threads < 1 || options.threads > 256) return error.set(PF_BAD_ARGUMENT, "threads=%d; expected 1 to 256", options.threads);
    if (options.kv_type < PF_KV_F32 || options.kv_type > PF_KV_INT8) {
        return error.set(PF_BAD_ARGUMENT, "kv_type=%d; expected 0 (f32), 1 (f16) or 2 (int8)", options.kv_type);
    }
    if (options.batch < 0 || options.batch > 4096) return error.set(PF_BAD_ARGUMENT, "batch=%d; expected 0 to 4096", options.batch);
    // Experts see a fraction of the tokens: of a larger batch they read their weights once for more of them.
    int batch = pf::smaller(options.batch > 0 ? options.batch : c.moe_layers() > 0 ? 512 : 128, options.context);
    options.batch = batch;
    layout.head_dim = c.head_dim;
    layout.type = options.kv_type;

    size_t n = size_t(batch), widest = size_t(pf::larger(c.hidden_size, pf::larger(c.query_size(), c.widest_ffn())));
    size_t qkv = pf::round_up(size_t(c.query_size() + 2 * c.kv_size()), pf::kPanel), vocabulary = pf::round_up(size_t(c.vocab_size), pf::kPanel);
    scores_stride_ = size_t(pf::kQueryTile) * (pf::round_up(size_t(options.context), pf::kPanel) + 2 * pf::kPanel);
    bool good = x_.allocate(n * size_t(c.hidden_size)) && normed_.allocate(n * widest) && qkv_.allocate(n * qkv) &&
                mixed_.allocate(n * size_t(c.query_size())) && gate_up_.allocate(n * 2 * size_t(pf::larger(c.ffn_size, c.shared_size))) &&
                product_.allocate(n * size_t(c.hidden_size)) && logits_.allocate(size_t(pf::smaller(kHeadTile, batch)) * vocabulary) &&
                scores_.allocate(scores_stride_ * size_t(options.threads)) && row_memory_.allocate(n, widest) &&
                cos_.allocate(size_t(options.context) * size_t(c.head_dim)) && sin_.allocate(size_t(options.context) * size_t(c.head_dim)) &&
                caches_.allocate(size_t(c.executed())) && (c.moe_layers() == 0 || mixture.allocate(c, batch, options.threads));
    if (!good) return error.set(PF_NO_MEMORY, "no memory for the scratch of a session of %d tokens", options.context);
    size_t total = 0;
    for (int pass = 0; pass < 2; ++pass) {
        size_t at = 0;
        for (int i = 0; i < c.executed(); ++i) {
            Attention kind = model->blocks[size_t(i / c.block_repeat)].attention;
            if (kind == Attention::kSkip) continue;
            // A window layer keeps what the oldest token of a batch still sees, and the batch.
            int kept = kind == Attention::kWindow ? pf::smaller(options.context, c.window + batch + pf::kPanel) : options.context;
            pf::Cache &cache = caches_[size_t(i)];
            cache.count = (kept + pf::kPanel - 1) / pf::kPanel;
            if (pass == 1) cache.blocks = kv_.data() + at;
            at += size_t(cache.count) * size_t(c.num_kv_heads) * layout.block_bytes();
        }
        total = at;
        if (pass == 0 && !kv_.allocate(total, true)) return error.set(PF_NO_MEMORY, "no memory for a key/value cache of %zu bytes", total);
    }
    kv_bytes = total;
    if (!pool.start(options.threads)) return error.set(PF_NO_MEMORY, "the system starts no %d threads", options.threads);
    fill_rope();
    return PF_OK;
}

void pf_session::fill_rope() {
    int d = model->config.head_dim, half = d / 2;
    for (int p = 0; p < options.context; ++p) {
        float *cosines = cos_.data() + size_t(p) * size_t(d), *sines = sin_.data() + size_t(p) * size_t(d);
        for (int i = 0; i < half; ++i) {
            double sine, cosine;
            sine_cosine(double(float(p) * model->inverse_frequencies[i]), &sine, &cosine);
            cosines[i] = cosines[half + i] = float(cosine);
            sines[i] = float(-sine);
            sines[half + i] = float(sine);
        }
    }
}

uint64_t pf_session::kv_read_bytes() const {
    const Config &c = model->config;
    uint64_t blocks = 0;
    for (int i = 0; i < c.executed(); ++i) {
        Attention kind = model->blocks[size_t(i / c.block_repeat)].attention;
        if (kind == Attention::kSkip) continue;
        int seen = kind == Attention::kWindow ? pf::smaller(length + 1, c.window) : length + 1;
        blocks += uint64_t((seen + pf::kPanel - 1) / pf::kPanel);
    }
    return blocks * uint64_t(c.num_kv_heads) * layout.block_bytes();
}

pf_status pf_session::eval(const int32_t *tokens, const int32_t *labels, int count, bool all, float *logits, float *nll, const Error &error) {
    const Config &c = model->config;
    if (count < 1) return error.set(PF_BAD_ARGUMENT, "%d tokens; expected at least 1", count);
    if (count > options.context - length) {
        return error.set(PF_BAD_ARGUMENT, "%d tokens after %d do not fit the session's context of %d", count, length, options.context);
    }
    for (int i = 0; i < count; ++i) {
        if (tokens[i] < 0 || tokens[i] >= c.vocab_size) {
            return error.set(PF_BAD_ARGUMENT, "token %d is %d; expected 0 to %d", i, tokens[i], c.vocab_size - 1);
        }
        if (labels != nullptr && labels[i] != -100 && (labels[i] < 0 || labels[i] >= c.vocab_size)) {
            return error.set(PF_BAD_ARGUMENT, "label %d is %d; expected -100 or 0 to %d", i, labels[i], c.vocab_size - 1);
        }
    }
    for (int done = 0; done < count;) {
        int part = pf::smaller(options.batch, count - done);
        forward(tokens + done, part);
        length += part;
        if (nll != nullptr) {
            for (int first = 0; first < part; first += kHeadTile) {
                int rows = pf::smaller(kHeadTile, part - first);
                head(first, rows, logits_.data());
                for (int t = 0; t < rows; ++t) {
                    int at = done + first + t;
                    const float *row = logits_.data() + size_t(t) * size_t(c.vocab_size);
                    nll[at] = 0.0f;
                    if (labels[at] == -100) continue;
                    model->ops->log_sum_exp(row, c.vocab_size, nll + at);
                    nll[at] -= row[labels[at]];
                }
            }
        } else if (logits != nullptr && all) {
            head(0, part, logits + size_t(done) * size_t(c.vocab_size));
        } else if (logits != nullptr && done + part == count) {
            head(part - 1, 1, logits);
        }
        done += part;
    }
    return PF_OK;
}

extern "C" {

pf_status pf_session_create(const pf_model *model, const pf_session_options *options, pf_session **session, char *text, size_t size) {
    Error error(text, size);
    *session = nullptr;
    void *memory = calloc(1, sizeof(pf_session));
    if (memory == nullptr) return error.set(PF_NO_MEMORY, "no memory for a session");
    pf_session *made = new (memory) pf_session;
    made->model = model;
    made->options = *options;
    pf_status status = made->create(error);
    if (status != PF_OK) {
        pf_session_free(made);
        return status;
    }
    *session = made;
    return PF_OK;
}

void pf_session_free(pf_session *session) {
    if (session == nullptr) return;
    session->~pf_session();
    free(session);
}

void pf_session_reset(pf_session *session) { session->length = 0; }
int32_t pf_session_length(const pf_session *session) { return session->length; }
uint64_t pf_session_kv_bytes(const pf_session *session) { return session->kv_bytes; }
uint64_t pf_session_kv_read_bytes(const pf_session *session) { return session->kv_read_bytes(); }

pf_status pf_session_eval(pf_session *session, const int32_t *tokens, int32_t count, int32_t all, float *logits, char *text, size_t size) {
    return session->eval(tokens, nullptr, count, all != 0, logits, nullptr, Error(text, size));
}

pf_status pf_session_nll(pf_session *session, const int32_t *tokens, const int32_t *labels, int32_t count, float *nll, char *text, size_t size) {
    return session->eval(tokens, labels, count, false, nullptr, nll, Error(text, size));
}

void pf_session_experts(const pf_session *session, uint64_t *hits, uint64_t *tokens, uint64_t *read_bytes) {
    const pf::Mixture &mixture = session->mixture;
    if (hits != nullptr && mixture.hits.size() > 0) memcpy(hits, mixture.hits.data(), mixture.hits.size() * sizeof(uint64_t));
    if (tokens != nullptr) *tokens = mixture.tokens;
    if (read_bytes != nullptr) *read_bytes = mixture.read_bytes;
}

int32_t pf_operation_count(void) { return pf::kOperations; }

const char *pf_operation_name(int32_t index) {
    static const char *const names[] = {"embed",    "norm",   "quantize", "qkv",  "rope and cache", "attention",
                                        "attention out", "gate and up", "swiglu", "down", "head", "route", "gather", "mix"};
    return index >= 0 && index < pf::kOperations ? names[index] : nullptr;
}

void pf_session_clocks(pf_session *session, int32_t enable, double *seconds) {
    if (seconds != nullptr) memcpy(seconds, session->seconds, sizeof session->seconds);
    memset(session->seconds, 0, sizeof session->seconds);
    session->timed = enable != 0;
}

} // extern "C"
