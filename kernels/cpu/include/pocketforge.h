/* C interface of the Pocketforge runtime: one packed file, mapped and run on a CPU.
 *
 * No exception and no allocation of the caller's crosses it. Functions that can fail return a pf_status and write one
 * line to `error` (always terminated, cut to `error_size`). A handle belongs to one thread at a time; models are
 * read-only once open and may be shared by sessions on several threads. */
#ifndef POCKETFORGE_H
#define POCKETFORGE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define PF_API __attribute__((visibility("default")))
#else
#define PF_API
#endif

typedef enum {
    PF_OK = 0,
    PF_BAD_FILE = 1,     /* the packed file is damaged, or not one */
    PF_BAD_ARGUMENT = 2, /* what was asked for makes no sense for this model */
    PF_NO_MEMORY = 3,
    PF_IO = 4
} pf_status;

typedef enum { PF_KV_F32 = 0, PF_KV_F16 = 1, PF_KV_INT8 = 2 } pf_kv_type;

typedef struct pf_model pf_model;
typedef struct pf_session pf_session;

typedef struct {
    int32_t vocab_size, hidden_size, num_layers, executed_layers, num_heads, num_kv_heads, head_dim, ffn_size;
    int32_t max_positions;
    uint64_t file_bytes;
    uint64_t decode_bytes;  /* weight bytes that one decoded token reads */
    uint64_t layer_weights; /* weights of all executed layers' matrices: multiply-adds of a token, without the head */
    /* Of a mixture of experts; 0 in a dense model. The two sums above count the experts of one token. */
    int32_t num_experts, top_k, moe_layers; /* stored layers that have experts */
    uint64_t expert_bytes;                  /* one routed expert's matrices */
} pf_model_info;

typedef struct {
    int32_t context; /* tokens that the session can hold; 1..max_positions */
    int32_t threads; /* 1..256 */
    int32_t kv_type; /* pf_kv_type */
    int32_t batch;   /* most tokens computed at once in a prefill; 0 takes 128 */
} pf_session_options;

/* Kernel variants, in the order of pf_isa_name: POCKETFORGE_ISA forces one by name. */
PF_API const char *pf_version(void);
PF_API int32_t pf_isa_count(void);
PF_API const char *pf_isa_name(int32_t index);
PF_API int32_t pf_isa_supported(int32_t index);
PF_API int32_t pf_isa_default(void); /* -1 where POCKETFORGE_ISA names none of this machine's */

/* isa < 0 takes the default. With `verify` every tensor's checksum is compared before the call returns. */
PF_API pf_status pf_model_open(const char *path, int32_t isa, int32_t verify, pf_model **model, char *error,
                               size_t error_size);
PF_API void pf_model_close(pf_model *model);
PF_API void pf_model_get_info(const pf_model *model, pf_model_info *info);
PF_API const char *pf_model_isa(const pf_model *model);
PF_API const char *pf_model_metadata(const pf_model *model, size_t *length); /* the JSON, not terminated */
PF_API const void *pf_model_tensor(const pf_model *model, const char *name, size_t *bytes); /* NULL: no such tensor */

PF_API pf_status pf_session_create(const pf_model *model, const pf_session_options *options, pf_session **session,
                                   char *error, size_t error_size);
PF_API void pf_session_free(pf_session *session);
PF_API void pf_session_reset(pf_session *session);
PF_API int32_t pf_session_length(const pf_session *session);
PF_API uint64_t pf_session_kv_bytes(const pf_session *session);
PF_API uint64_t pf_session_kv_read_bytes(const pf_session *session); /* cache bytes that the next token will read */

/* Add `count` tokens. `logits` receives the last token's [vocab_size], or with `all` every token's
 * [count, vocab_size]; it may be NULL. On an error the session is as before. */
PF_API pf_status pf_session_eval(pf_session *session, const int32_t *tokens, int32_t count, int32_t all, float *logits,
                                 char *error, size_t error_size);
/* As eval with `all`, but keeps only each token's negative log-likelihood [count] of `labels` (-100: 0), in nats. */
PF_API pf_status pf_session_nll(pf_session *session, const int32_t *tokens, const int32_t *labels, int32_t count,
                                float *nll, char *error, size_t error_size);

/* One id of logits [size]. temperature 0: the likeliest, the lowest id of equals. `state` is the generator's, any
 * value but 0, and moves on. */
PF_API int32_t pf_sample(const float *logits, int32_t size, float temperature, float top_p, uint64_t *state);

/* Seconds by operation since the last reset of the clocks, in the order of pf_operation_name. */
PF_API int32_t pf_operation_count(void);
PF_API const char *pf_operation_name(int32_t index);
PF_API void pf_session_clocks(pf_session *session, int32_t enable, double *seconds);

/* What a mixture's router did since the session was created. `hits` receives [moe_layers, num_experts] counts of tokens; `tokens`
 * those that went through the model; `read_bytes` the routed experts' matrices, each one that a batch needs counted once a batch and
 * layer. Each may be NULL. */
PF_API void pf_session_experts(const pf_session *session, uint64_t *hits, uint64_t *tokens, uint64_t *read_bytes);

/* Single operations with the runtime's arithmetic, for frameworks; all tensors are dense fp32, row after row.
 * linear: y [count, rows] = W x of a matrix in panels (encoding 0: int4_g32, 1: int8_row), x [count, k] rounded to INT8.
 * attend: q [tokens, heads, head_dim] after rotation, k and v [past + tokens, kv_heads, head_dim]; causal, each token
 * seeing `window` tokens, itself included. */
PF_API pf_status pf_op_linear(int32_t encoding, const void *panels, int32_t rows, int32_t k, const float *x, int32_t count, float *y);
PF_API pf_status pf_op_rms_norm(const float *x, const float *weight, int32_t count, int32_t n, float eps, float *out);
PF_API pf_status pf_op_swiglu(const float *gate, const float *up, int32_t count, int32_t n, float *out);
PF_API pf_status pf_op_attend(const float *q, const float *k, const float *v, int32_t tokens, int32_t past, int32_t heads,
                              int32_t kv_heads, int32_t head_dim, int32_t window, float *out);

/* router: logits [count, experts] of x [count, n] and weight [experts, n].
 * route: of each row of logits the `top_k` experts (ids ascending) and their mixing weights [count, top_k]; `softmax` and `normalize`
 * are 0 or 1. Scores, ties and what is no number: kernels/cpu/src/routing.h.
 * mix: out [count, n] = first [count, n] (NULL: 0), then for i = 0..k-1 out += weights[count, i] * rows[count, i, n], fused. */
PF_API pf_status pf_op_router(const float *x, const float *weight, int32_t count, int32_t n, int32_t experts, float *logits);
PF_API pf_status pf_op_route(const float *logits, const float *bias, int32_t count, int32_t experts, int32_t top_k, int32_t softmax,
                             int32_t normalize, float scale, int32_t *chosen, float *weights);
PF_API pf_status pf_op_mix(const float *first, const float *rows, const float *weights, int32_t count, int32_t k, int32_t n, float *out);

PF_API uint32_t pf_crc32c(const void *data, size_t size, uint32_t seed);
/* Integer operations a second of one thread's registers alone (2 a multiply-add); 0 where the variant does not say. */
PF_API double pf_int8_peak(int32_t repeats);
PF_API double pf_read_bandwidth(size_t bytes, int32_t threads, int32_t repeats); /* best of the repeats, bytes a second */

#ifdef __cplusplus
}
#endif
#endif
