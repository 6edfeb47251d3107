// Large pages: streaming through 4 KB pages costs up to half of the bandwidth.
#include "kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tandem {
namespace {

// Advice is only that: where it is refused, small pages stay.
void advise(void *data, int64_t bytes, int advice) {
#if defined(__linux__)
    constexpr uintptr_t page = 4096, worthwhile = 2 << 20;
    uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
    uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(page - 1);
    if (end >= begin + worthwhile) madvise(reinterpret_cast<void *>(begin), end - begin, advice);
#else
    (void)data, (void)bytes, (void)advice;
#endif
}

constexpr int kHugePage = 14, kCollapse = 25;  // MADV_HUGEPAGE, MADV_COLLAPSE

}  // namespace

void use_huge_pages(void *data, int64_t bytes) { advise(data, bytes, kHugePage); }

void collapse_pages(void *data, int64_t bytes) {
    advise(data, bytes, kHugePage);
    advise(data, bytes, kCollapse);
}

}  // namespace tandem
