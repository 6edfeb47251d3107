// Copies scattered pieces in one call, so that Python's lock is given up once a slice and not
// once a piece. Large pieces bypass the cache: KV is not read before the whole prompt is there.
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>

static void copy_past_cache(uint8_t* target, const uint8_t* source, int64_t nbytes) {
    const int64_t head = (-reinterpret_cast<intptr_t>(target)) & 63;
    memcpy(target, source, head);
    int64_t at = head;
    for (; at + 64 <= nbytes; at += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(source + at + 1024), _MM_HINT_T0);
        const auto* from = reinterpret_cast<const __m128i*>(source + at);
        auto* to = reinterpret_cast<__m128i*>(target + at);
        const __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1);
        const __m128i c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
        _mm_stream_si128(to, a);
        _mm_stream_si128(to + 1, b);
        _mm_stream_si128(to + 2, c);
        _mm_stream_si128(to + 3, d);
    }
    memcpy(target + at, source + at, nbytes - at);
}

static void finish() { _mm_sfence(); }
#else
static void copy_past_cache(uint8_t* target, const uint8_t* source, int64_t nbytes) {
    memcpy(target, source, nbytes);
}
static void finish() {}
#endif

static const int64_t small_bytes = 16384;

extern "C" __attribute__((visibility("default"))) void tandem_copy(
    uint8_t* target, const uint8_t* source, const int64_t* target_offsets,
    const int64_t* source_offsets, const int64_t* nbytes, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        uint8_t* to = target + target_offsets[i];
        const uint8_t* from = source + source_offsets[i];
        if (nbytes[i] < small_bytes)
            memcpy(to, from, nbytes[i]);
        else
            copy_past_cache(to, from, nbytes[i]);
    }
    finish();
}
