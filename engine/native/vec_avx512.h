// Sixteen fp32 lanes in one AVX-512 register.
struct Vec {
    __m512 v;
};

inline Vec splat(float value) { return {_mm512_set1_ps(value)}; }
inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline __m512 widen16(__m256i narrow) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

#if defined(TANDEM_HAVE_DPBF16)
inline __m256i narrow16(__m512 value) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)); }
#else
// Round to nearest even; a NaN keeps its upper bits and turns quiet.
inline __m256i narrow16(__m512 value) {
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
#endif

inline Vec load(const float *p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const bf16 *p) { return {widen16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)))}; }
inline Vec load(const float *p, int64_t n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
inline Vec load(const bf16 *p, int64_t n) { return {widen16(_mm256_maskz_loadu_epi16(first_lanes(n), p))}; }
inline void store(float *p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(bf16 *p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), narrow16(a.v)); }
inline void store(float *p, Vec a, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }
inline void store(bf16 *p, Vec a, int64_t n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow16(a.v)); }

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec larger(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec smaller(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec nearest(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

// a * 2^n for whole n in -126 .. 127, and 0 for n = -127: a result below the normal numbers
// would cost hundreds of cycles.
inline Vec scale_by_power(Vec a, Vec n) {
    __mmask16 normal = _mm512_cmp_ps_mask(n.v, _mm512_set1_ps(-127.f), _CMP_GT_OQ);
    return {_mm512_maskz_scalef_ps(normal, a.v, n.v)};
}

// Lanes begin .. end - 1 keep their value, the others become `fill`.
inline Vec keep(Vec a, int64_t begin, int64_t end, float fill) {
    __mmask16 kept = end <= begin ? 0 : static_cast<__mmask16>(first_lanes(end) & ~first_lanes(begin));
    return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), kept, a.v)};
}

inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }

// Sixteen pairs: (even[i], odd[i]).
inline __m512i join(const bf16 *even, const bf16 *odd) {
    auto widen = [](const bf16 *p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); };
    return _mm512_or_si512(widen(even), _mm512_slli_epi32(widen(odd), 16));
}

// Pairs of bf16, one pair a lane.
#if defined(TANDEM_HAVE_DPBF16)
struct Pairs {
    __m512bh v;
};
inline Pairs load_pairs(const bf16 *p) { return {reinterpret_cast<__m512bh>(_mm512_loadu_si512(p))}; }
inline Pairs splat_pair(const bf16 *p) {
    int32_t pair;
    std::memcpy(&pair, p, 4);
    return {reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair))};
}
inline Pairs join_pairs(const bf16 *even, const bf16 *odd) { return {reinterpret_cast<__m512bh>(join(even, odd))}; }
inline Vec dot(Vec total, const Pairs &a, const Pairs &b) { return {_mm512_dpbf16_ps(total.v, a.v, b.v)}; }
#else
struct Pairs {
    Vec even, odd;
};
inline Pairs split(__m512i pairs) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))}, {_mm512_castsi512_ps(_mm512_and_si512(pairs, upper))}};
}
inline Pairs load_pairs(const bf16 *p) { return split(_mm512_loadu_si512(p)); }
inline Pairs splat_pair(const bf16 *p) {
    int32_t pair;
    std::memcpy(&pair, p, 4);
    return split(_mm512_set1_epi32(pair));
}
inline Pairs join_pairs(const bf16 *even, const bf16 *odd) { return {load(even), load(odd)}; }
inline Vec dot(Vec total, const Pairs &a, const Pairs &b) { return fma(a.odd, b.odd, fma(a.even, b.even, total)); }
#endif

// 16 rows of 16 words become 16 columns of a matrix whose rows are `stride` words apart.
inline void transpose16(const uint32_t *const rows[16], uint32_t *out, int64_t stride) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(rows[i]);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int half = 0; half < 2; half++) {
            a[i + 2 * half] = _mm512_unpacklo_epi64(b[i + half], b[i + half + 2]);
            a[i + 2 * half + 1] = _mm512_unpackhi_epi64(b[i + half], b[i + half + 2]);
        }
    // a[4 g + c] now holds, in its 128-bit piece q, column 4 q + c of rows 4 g .. 4 g + 3.
    for (int c = 0; c < 4; c++) {
        __m512i low = _mm512_shuffle_i32x4(a[c], a[c + 4], 0x88), high = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0x88);
        _mm512_storeu_si512(out + c * stride, _mm512_shuffle_i32x4(low, high, 0x88));
        _mm512_storeu_si512(out + (c + 8) * stride, _mm512_shuffle_i32x4(low, high, 0xdd));
        low = _mm512_shuffle_i32x4(a[c], a[c + 4], 0xdd), high = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0xdd);
        _mm512_storeu_si512(out + (c + 4) * stride, _mm512_shuffle_i32x4(low, high, 0x88));
        _mm512_storeu_si512(out + (c + 12) * stride, _mm512_shuffle_i32x4(low, high, 0xdd));
    }
}

// Two rows of 32 become pairs: (even[i], odd[i]) for i < 16 in `low`, the others in `high`.
inline void interleave(const bf16 *even, const bf16 *odd, bf16 *low, bf16 *high) {
    _mm512_storeu_si512(low, join(even, odd));
    _mm512_storeu_si512(high, join(even + 16, odd + 16));
}

// Products take rows as they are.
template <class T>
using Left = T;

// Rows of a product whose sums fit the registers, over a whole panel and over half of one.
constexpr int kMaxRows = 12;
template <class T>
constexpr int kMaxHalfRows = 12;
