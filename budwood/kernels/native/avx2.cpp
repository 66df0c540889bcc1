// AVX2 with FMA and F16C.
#include "avx2.h"
#include "avx2_tiles.h"

namespace budwood {

const with_avx2::Tables& with_avx2::tables_of_bytes() {
    static const Tables tables;  // made on first use: never before the CPU is known to have AVX2
    return tables;
}

const Tiled tiled_with_avx2 = {tiles::bytes, tiles::border, tiles::few, &tiles::by_sparse, false};

const Path avx2 = {"avx2", false, with_avx2::few, with_avx2::integers, &with_avx2::by_sparse, nullptr, with_avx2::dense,
                   &tiled_with_avx2, true, &with_avx2::attends, with_avx2::norm};

}  // namespace budwood
