// What differs between instruction sets, as one table of functions. `ref.cpp` is the specification: every other variant gives
// the same bits. Integers are exact; floats are computed in one order (float_ops.h), with fused multiply-adds where
// the reference has them.
#pragma once

#include "common.h"

namespace pf {

// A matrix [rows, k] in panels of 16 rows; see docs/packed-format.md.
struct Matrix {
    enum Encoding { kInt4, kInt8 } encoding = kInt4;
    const uint8_t *data = nullptr;
    int rows = 0, k = 0;

    int panels() const { return (rows + kPanel - 1) / kPanel; }
    int groups() const { return k / kGroup; }
    // INT4: fp16 scales [group][16 rows], then codes; INT8: fp32 scales [16 rows], then codes.
    size_t scale_bytes() const {
        return encoding == kInt4 ? round_up(size_t(groups()) * kPanel * 2, kAlignment) : kPanel * sizeof(float);
    }
    size_t code_bytes() const { return encoding == kInt4 ? size_t(k) * kPanel / 2 : size_t(k) * kPanel; }
    size_t panel_bytes() const { return scale_bytes() + code_bytes(); }
    size_t bytes() const { return panel_bytes() * size_t(panels()); }
    uint64_t weights() const { return uint64_t(rows) * uint64_t(k); }
    const uint8_t *panel(int index) const { return data + size_t(index) * panel_bytes(); }
};

// `count` rows of quantized activations: codes in [-127, 127], one scale a row.
struct Rows {
    int count = 0, k = 0;
    int8_t *codes = nullptr;      // [count, k]
    float *scales = nullptr;      // [count]
    int32_t *offsets = nullptr;   // [count, k / 32]: -8 * the sum of the group's codes, which undoes the nibbles' bias of 8
    int8_t *packed = nullptr;     // codes and offsets in the variant's own order (Ops::pack_rows)
    int32_t *packed_offsets = nullptr;
};

// Memory for rows of any width up to `widest`; count == 1 needs no packed form.
struct RowMemory {
    Buffer<int8_t> codes, packed;
    Buffer<float> scales;
    Buffer<int32_t> offsets, packed_offsets;

    bool allocate(size_t rows, size_t widest) {
        return codes.allocate(rows * widest) && packed.allocate(rows * widest) && scales.allocate(rows) &&
               offsets.allocate(rows * widest / kGroup) && packed_offsets.allocate(rows * widest / kGroup);
    }
    // Rows first, first + 1 ... of width k.
    Rows rows(int first, int count, int k) {
        size_t at = size_t(first) * size_t(k), group = at / kGroup;
        return {count, k, codes.data() + at, scales.data() + first, offsets.data() + group, packed.data() + at, packed_offsets.data() + group};
    }
};

// Rows of a tile, where `most` fit one: as few tiles as can be, of like sizes. 13 rows are 7 and 6, not 12 and a slow 1.
inline int tile_rows(int count, int most) {
    int tiles = (count + most - 1) / most;
    return tiles == 0 ? most : (count + tiles - 1) / tiles;
}

// Tiles of tile_rows(count, most) rows, the last one of what is left: codes [k / 4][rows of the tile][4], offsets
// [k / 32][rows of the tile]. Only the tiles that begin in [first, last).
inline void pack_tiles(Rows &x, int most, int first, int last) {
    int tile = tile_rows(x.count, most);
    first = (first + tile - 1) / tile * tile;
    for (; first < last; first += tile) {
        int rows = smaller(tile, x.count - first), fours = x.k / 4;
        // Sixteen columns of 4 are one cache line of a row: written while they are near.
        int32_t *codes = reinterpret_cast<int32_t *>(x.packed + size_t(first) * size_t(x.k));
        const int32_t *from = reinterpret_cast<const int32_t *>(x.codes + size_t(first) * size_t(x.k));
        for (int begin = 0; begin < fours; begin += 16) {
            int end = smaller(begin + 16, fours);
            for (int r = 0; r < rows; ++r) {
                for (int i = begin; i < end; ++i) codes[i * rows + r] = from[r * fours + i];
            }
        }
        int groups = x.k / kGroup;
        int32_t *offsets = x.packed_offsets + size_t(first) * size_t(groups);
        const int32_t *sums = x.offsets + size_t(first) * size_t(groups);
        for (int r = 0; r < rows; ++r) {
            for (int g = 0; g < groups; ++g) offsets[g * rows + r] = sums[r * groups + g];
        }
    }
}

struct Rope {
    const float *cos, *sin;  // [head_dim] of one position; the first half of `sin` is negated
};

// 16 tokens of one key/value head. Keys lie transposed, so that a lane is a token: [head_dim][16] for floats,
// [head_dim / 4][16][4] for INT8; values [16][head_dim].
struct KvLayout {
    int head_dim = 0;
    int type = PF_KV_F16;
    size_t element() const { return type == PF_KV_F32 ? 4 : type == PF_KV_F16 ? 2 : 1; }
    size_t key_bytes() const { return element() * size_t(head_dim) * kPanel; }
    size_t scale_bytes() const { return type == PF_KV_INT8 ? kPanel * sizeof(float) : 0; }
    size_t key_scales() const { return key_bytes(); }
    size_t values() const { return key_bytes() + scale_bytes(); }
    size_t value_scales() const { return values() + key_bytes(); }
    size_t block_bytes() const { return 2 * (key_bytes() + scale_bytes()); }
};

constexpr int kQueryTile = 8;  // query rows that one attention call takes

struct Query {
    const float *q;    // [head_dim]
    float *out;        // [head_dim]
    int first, last;   // tokens it sees, last one included
};

struct KvRing {
    uint8_t *blocks;   // [count][block_bytes]
    int count;         // block b lies at b % count
    KvLayout layout;
    bool ahead = false;  // whether to ask for blocks before they are needed
};

struct Ops {
    const char *name;
    bool (*supported)();
    // y[t, row] for all rows of panels [begin, end) and tokens of x; y has `stride` floats a token.
    void (*multiply)(const Matrix &w, const Rows &x, int begin, int end, float *y, size_t stride);
    void (*pack_rows)(Rows &x, int first, int last);  // fills x.packed for tiles beginning in [first, last); may be null
    void (*quantize_row)(const float *x, int k, int8_t *codes, float *scale, int32_t *offsets);
    void (*rms_norm)(const float *x, const float *weight, int n, float eps, float *out);  // weight may be null
    void (*rope)(float *x, int head_dim, Rope rope);
    void (*swiglu)(const float *gate, const float *up, int n, float *out);
    void (*add)(float *x, const float *y, int n);
    void (*store_kv)(KvRing ring, int position, const float *key, const float *value);
    // scores: scratch of kQueryTile * round_up(tokens, 16) floats.
    void (*attend)(KvRing ring, const Query *queries, int count, float scale, float *scores);
    void (*log_sum_exp)(const float *x, int n, float *result);
    void (*exponentials)(float *x, int n);  // in place; n is a multiple of 16
    // logits [tokens, experts] = x [tokens, n] times w [experts, n], in fp32.
    void (*router)(const float *x, const float *w, int tokens, int experts, int n, float *logits);
    void (*add_scaled)(float *x, const float *y, float scale, int n);  // x += scale * y, rounded once; n is a multiple of 16
    // `rounds` of as many multiply-adds of bytes as the registers hold at once, returning how many: the limit of a product.
    // May be null.
    int64_t (*burn)(int64_t rounds);
    uint64_t (*read)(const uint8_t *data, size_t bytes);  // sums 64-byte lines: how fast memory can be read
};

extern const Ops kRefOps;
#if defined(__x86_64__)
extern const Ops kAvx2Ops, kAvx512Ops;
#elif defined(__aarch64__)
extern const Ops kNeonDotOps, kNeonI8mmOps;
#endif

int ops_count();
const Ops *ops_at(int index);
// The fastest that this machine has, or the one that POCKETFORGE_ISA names; null where that is not one of them.
const Ops *default_ops();

} // namespace pf
