#include "kernels.h"

#if defined(__x86_64__)
#include <cmath>
#include <cstring>
#include <immintrin.h>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#define TANDEM_HAVE_DPBF16

namespace tandem {
namespace avx512_bf16 {
#include "vec_avx512.h"
#include "all.inl"
}  // namespace avx512_bf16

const Kernels avx512_bf16_kernels = {avx512_bf16::linear, avx512_bf16::norm, avx512_bf16::activation, avx512_bf16::place, avx512_bf16::attention, avx512_bf16::highest};
}  // namespace tandem
#endif
