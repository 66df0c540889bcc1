// AVX2, matrices in tiles and few rows of x, but for 4-bit values.
#include "avx2_tiles_few.h"

namespace budwood::tiles {

int64_t bytes(const Matrix& a) { return head_of(a).bytes; }

int64_t border(const Matrix& a, int part, int parts) {
    const Head& h = head_of(a);
    const int64_t *begins = begins_of(h), wanted = h.data + (begins[h.strips] - h.data) * part / parts;
    return part == parts ? h.strips : std::lower_bound(begins, begins + h.strips, wanted) - begins;
}

void few(const Matrix* matrices, int32_t count, const void* x, int32_t type, int64_t rows, const Output* outputs, int part,
         int parts) {
    few_of_any(few_int4, matrices, count, x, type, rows, outputs, part, parts);
}

void few_of_any(Few int4, const Matrix* matrices, int32_t count, const void* x, int32_t type, int64_t rows,
                const Output* outputs, int part, int parts) {
    const int32_t own = type_of(head_of(matrices[0]));
    for (int32_t i = 1; i < count; ++i) {
        if (type_of(head_of(matrices[i])) == own) continue;
        few_of_any(int4, matrices, i, x, type, rows, outputs, part, parts);
        return few_of_any(int4, matrices + i, count - i, x, type, rows, outputs + i, part, parts);
    }
    if (own == INT4 || own == WHOLE || own == SHORTS) return int4(matrices, count, x, type, rows, outputs, part, parts);
    by_rows(rows, [&](auto m) {
        switch (own) {
            case FLOAT32: return few_of<FLOAT32, m()>(matrices, count, x, type, outputs, part, parts);
            case BFLOAT16: return few_of<BFLOAT16, m()>(matrices, count, x, type, outputs, part, parts);
            case FLOAT16: return few_of<FLOAT16, m()>(matrices, count, x, type, outputs, part, parts);
            default: return few_of<INT8, m()>(matrices, count, x, type, outputs, part, parts);
        }
    });
}

}  // namespace budwood::tiles
