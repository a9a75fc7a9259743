// Products of INT4 matrices whose groups run along the outputs: 32 outputs share a scale for each column.
//
// A scale that changes from column to column cannot be taken out of the sum over columns, so it goes into the activations: for each
// 32 outputs the row times the scales, in fp32, is rounded to INT8 with a scale of its own and multiplied by the codes alone.
#include "ops.h"

namespace pf {

void multiply_out(const Ops &ops, const Matrix &w, const float *x, const int32_t *index, int count, int begin, int end, float *y,
                  size_t stride, Rows rows) {
    size_t k = size_t(w.k);
    for (int pair = begin; pair < end; ++pair) {
        for (size_t t = 0; t < size_t(count); ++t) {
            const float *row = x + size_t(index == nullptr ? t : size_t(index[t])) * k;
            ops.quantize_scaled(row, w.column_scales(pair), w.k, rows.codes + t * k, rows.scales + t, rows.offsets + t * k / kGroup);
        }
        if (count > 1 && ops.pack_rows != nullptr) ops.pack_rows(rows, 0, count);
        Matrix codes = w.codes_of(pair);
        ops.multiply(codes, rows, 0, codes.panels(), y + size_t(pair) * kGroup, stride);
    }
}

} // namespace pf
