// Which of the instruction sets this machine can run, best first.
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tandem {
namespace {

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// The processor must have the tiles and the kernel must grant their state to this process.
bool has_amx() {
    unsigned a, b, c, d;
    if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned bf16_tiles = 1u << 22, tiles = 1u << 24;
    constexpr long request_permission = 0x1023, tile_data = 18;
    if ((d & bf16_tiles) == 0 || (d & tiles) == 0) return false;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

}  // namespace

const InstructionSet instruction_sets[kInstructionSets] = {
#if defined(__x86_64__)
    {"amx", has_amx, &amx_kernels},
    {"avx512_bf16", has_avx512_bf16, &avx512_bf16_kernels},
    {"avx512", has_avx512, &avx512_kernels},
    {"avx2", has_avx2, &avx2_kernels},
#endif
    {"scalar", always, &scalar_kernels},
};

}  // namespace tandem
