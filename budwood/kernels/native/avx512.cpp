// AVX-512 with VBMI2 and bf16.
#include "avx512.h"

namespace budwood {

const Path avx512 = {
    "avx512",
    true,
    false,
    with_avx512::few,
    with_avx512::integers,
    with_avx512::table_bytes,
    with_avx512::tables,
    with_avx512::tabulate,
    with_avx512::many,
    with_avx512::dense,
};

}  // namespace budwood
