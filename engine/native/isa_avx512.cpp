#include "kernels.h"

#if defined(__x86_64__)
#include <cmath>
#include <cstring>
#include <immintrin.h>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

namespace tandem {
namespace avx512 {
#include "vec_avx512.h"
#include "all.inl"
}  // namespace avx512

const Kernels avx512_kernels = {avx512::linear, avx512::norm, avx512::activation, avx512::place, avx512::attention, avx512::highest};
}  // namespace tandem
#endif
