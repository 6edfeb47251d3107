// AMX tiles for bf16; fp32 goes the AVX-512 way.
#include "kernels.h"

#if defined(__x86_64__)
#include <cmath>
#include <cstring>
#include <immintrin.h>
#include <limits>
#include <type_traits>
#include <optional>
#include <utility>
#include <vector>

#define TANDEM_HAVE_DPBF16

namespace tandem {
namespace amx {
#include "vec_avx512.h"
#include "math.inl"
#include "pointwise.inl"
#include "product.inl"
#include "linear.inl"
#include "fetching.inl"
#include "attention.inl"
#include "few_rows.inl"
#include "amx.inl"
#include "amx_linear.inl"
#include "amx_softmax.inl"
#include "amx_prompt.inl"
#include "amx_decode.inl"

void linear(const LinearArgs &args) {
    if (args.dtype == kFloat32) return linear_of<float>(args);
    linear_tiles(args);
}

void attention(const AttentionArgs &args) {
    args.dtype == kBfloat16 ? attention_tiles(args) : attention_of<float>(args);
}
}  // namespace amx

const Kernels amx_kernels = {amx::linear, amx::norm, amx::activation, amx::place, amx::attention, amx::highest};
}  // namespace tandem
#endif
