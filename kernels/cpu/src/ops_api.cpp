// Single operations over the C interface: what a framework needs to compute with the runtime's arithmetic.
#include "ops.h"

extern "C" {

pf_status pf_op_linear(int32_t encoding, const void *panels, int32_t rows, int32_t k, const float *x, int32_t count, float *y) {
    const pf::Ops *ops = pf::default_ops();
    if (ops == nullptr || rows < 1 || k < pf::kGroup || k % pf::kGroup != 0 || count < 1 || (encoding != 0 && encoding != 1)) {
        return PF_BAD_ARGUMENT;
    }
    pf::Matrix w;
    w.encoding = encoding == 0 ? pf::Matrix::kInt4 : pf::Matrix::kInt8;
    w.data = static_cast<const uint8_t *>(panels);
    w.rows = rows;
    w.k = k;
    constexpr int kBatch = 240;
    size_t n = size_t(pf::smaller(count, kBatch)), width = size_t(k);
    pf::RowMemory memory;
    if (!memory.allocate(n, width)) return PF_NO_MEMORY;
    for (int first = 0; first < count; first += kBatch) {
        pf::Rows rows_of_x = memory.rows(0, pf::smaller(kBatch, count - first), k);
        for (int t = 0; t < rows_of_x.count; ++t) {
            size_t at = size_t(t) * width;
            ops->quantize_row(x + size_t(first) * width + at, k, rows_of_x.codes + at, rows_of_x.scales + t, rows_of_x.offsets + at / pf::kGroup);
        }
        if (rows_of_x.count > 1 && ops->pack_rows != nullptr) ops->pack_rows(rows_of_x, 0, rows_of_x.count);
        ops->multiply(w, rows_of_x, 0, w.panels(), y + size_t(first) * size_t(rows), size_t(rows));
    }
    return PF_OK;
}

pf_status pf_op_rms_norm(const float *x, const float *weight, int32_t count, int32_t n, float eps, float *out) {
    const pf::Ops *ops = pf::default_ops();
    if (ops == nullptr || count < 0 || n < 16 || n % 16 != 0) return PF_BAD_ARGUMENT;
    for (int t = 0; t < count; ++t) ops->rms_norm(x + size_t(t) * size_t(n), weight, n, eps, out + size_t(t) * size_t(n));
    return PF_OK;
}

pf_status pf_op_swiglu(const float *gate, const float *up, int32_t count, int32_t n, float *out) {
    const pf::Ops *ops = pf::default_ops();
    if (ops == nullptr || count < 0 || n < 16 || n % 16 != 0) return PF_BAD_ARGUMENT;
    for (int t = 0; t < count; ++t) {
        size_t at = size_t(t) * size_t(n);
        ops->swiglu(gate + at, up + at, n, out + at);
    }
    return PF_OK;
}

pf_status pf_op_attend(const float *q, const float *k, const float *v, int32_t tokens, int32_t past, int32_t heads, int32_t kv_heads,
                       int32_t head_dim, int32_t window, float *out) {
    const pf::Ops *ops = pf::default_ops();
    if (ops == nullptr || tokens < 1 || past < 0 || kv_heads < 1 || heads % kv_heads != 0 || head_dim < 32 || head_dim % 32 != 0 ||
        head_dim > 512 || window < 1) {
        return PF_BAD_ARGUMENT;
    }
    pf::KvLayout layout;
    layout.head_dim = head_dim;
    layout.type = PF_KV_F32;
    int total = past + tokens, group = heads / kv_heads, count = tokens * group;
    size_t d = size_t(head_dim), blocks = size_t((total + pf::kPanel - 1) / pf::kPanel);
    pf::Buffer<uint8_t> memory;
    pf::Buffer<float> scores;
    if (!memory.allocate(blocks * layout.block_bytes()) || !scores.allocate(size_t(pf::kQueryTile) * (blocks + 1) * pf::kPanel)) {
        return PF_NO_MEMORY;
    }
    pf::KvRing ring = {memory.data(), int(blocks), layout};
    float scale = 1.0f / __builtin_sqrtf(float(head_dim));
    for (int kv = 0; kv < kv_heads; ++kv) {
        for (int s = 0; s < total; ++s) {
            size_t at = (size_t(s) * size_t(kv_heads) + size_t(kv)) * d;
            ops->store_kv(ring, s, k + at, v + at);
        }
        for (int first = 0; first < count; first += pf::kQueryTile) {
            pf::Query queries[pf::kQueryTile];
            int rows = pf::smaller(pf::kQueryTile, count - first);
            for (int i = 0; i < rows; ++i) {
                int t = (first + i) / group, head = kv * group + (first + i) % group, position = past + t;
                size_t at = (size_t(t) * size_t(heads) + size_t(head)) * d;
                queries[i] = {q + at, out + at, pf::larger(0, position - window + 1), position};
            }
            ops->attend(ring, queries, rows, scale, scores.data());
        }
    }
    return PF_OK;
}

} // extern "C"
