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
namespace avx2 {
#include "vec_avx2.h"
#include "all.inl"
}  // namespace avx2

const Kernels avx2_kernels = {avx2::linear, avx2::norm, avx2::activation, avx2::place, avx2::attention, avx2::highest};
}  // namespace tandem
#endif
