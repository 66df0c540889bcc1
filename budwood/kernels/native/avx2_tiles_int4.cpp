// AVX2, matrices of 4-bit values in tiles and few rows of x.
#include "avx2_tiles_few.h"

namespace budwood::tiles {

void few_int4(const Matrix* matrices, int32_t count, const void* x, int32_t type, int64_t rows, const Output* outputs, int part,
              int parts) {
    const bool whole = type_of(head_of(matrices[0])) == WHOLE;
    by_rows(rows, [&](auto m) {
        whole ? few_of<WHOLE, m()>(matrices, count, x, type, outputs, part, parts)
              : few_of<INT4, m()>(matrices, count, x, type, outputs, part, parts);
    });
}

}  // namespace budwood::tiles
