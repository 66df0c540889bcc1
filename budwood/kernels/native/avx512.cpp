// AVX-512 with VBMI2 and bf16.
#include "avx512.h"

namespace budwood {

using namespace with_avx512;

const Path avx512 = {"avx512", true, few, integers, &by_sparse, &by_panels, dense, &tiled_with_avx512, false,
                     nullptr, nullptr};

}  // namespace budwood
