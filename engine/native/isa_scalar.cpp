#include "kernels.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

namespace tandem {
namespace scalar {
#include "vec_scalar.h"
#include "all.inl"
}  // namespace scalar

const Kernels scalar_kernels = {scalar::linear, scalar::norm, scalar::activation, scalar::place, scalar::attention, scalar::highest};
}  // namespace tandem
