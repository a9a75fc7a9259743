// What pocketforge-check compares: variants of the kernels against the reference, bit by bit.
#pragma once

#include <initializer_list>

#include "routing.h"

namespace pf {
namespace check {

// Counts a comparison, and keeps the text (as of printf) of one that fails.
__attribute__((format(printf, 4, 5))) void same(const void *found, const void *expected, size_t bytes, const char *format, ...);

uint32_t random_bits();
inline float random_float(float range) { return (float(random_bits() & 0xffffffu) / 8388608.0f - 1.0f) * range; }

// Some memory of one comparison. None can go on without it.
template <typename T> struct Memory : Buffer<T> {
    explicit Memory(size_t count) {
        if (this->allocate(count)) return;
        fprintf(stderr, "error: no memory\n");
        exit(2);
    }
};

constexpr int kContents = 8;  // kinds of matrices and activations
constexpr int kRowKinds = 9;  // kinds of rows of floats

// [m, k] x [n, k] by every variant, or by `only` alone, once and whole.
void multiply(Matrix::Encoding encoding, int n, int k, int m, int content, const Ops *only = nullptr);
void floats(const Ops &ops, int n, int kind);
// `tokens` rows of n by `experts`; each logit may be computed in a tile of any size.
void router(const Ops &ops, int tokens, int experts, int n, int kind);
void read(const Ops &ops, size_t bytes);
// `tokens` tokens through a ring of `blocks` blocks, then up to 8 queries.
void attention(const Ops &ops, KvLayout layout, int tokens, int blocks);

} // namespace check
} // namespace pf
