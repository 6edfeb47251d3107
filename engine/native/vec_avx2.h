// Sixteen fp32 lanes in two AVX2 registers.
struct Vec {
    __m256 low, high;
};

inline Vec splat(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }

inline __m256 widen8(const bf16 *p) {
    __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}

// Round to nearest even; a NaN keeps its upper bits and turns quiet.
inline __m256i narrow8(__m256 value) {
    __m256i bits = _mm256_castps_si256(value);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
}

inline Vec load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Vec load(const bf16 *p) { return {widen8(p), widen8(p + 8)}; }
inline void store(float *p, Vec v) { _mm256_storeu_ps(p, v.low), _mm256_storeu_ps(p + 8, v.high); }
inline void store(bf16 *p, Vec v) {
    __m256i packed = _mm256_packus_epi32(narrow8(v.low), narrow8(v.high));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

template <class T>
inline Vec load(const T *p, int64_t n) {
    T padded[16] = {};
    std::memcpy(padded, p, n * sizeof(T));
    return load(padded);
}

template <class T>
inline void store(T *p, Vec v, int64_t n) {
    T padded[16];
    store(padded, v);
    std::memcpy(p, padded, n * sizeof(T));
}

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Vec fma(Vec a, Vec b, Vec c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Vec larger(Vec a, Vec b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Vec smaller(Vec a, Vec b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Vec nearest(Vec a) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.low, mode), _mm256_round_ps(a.high, mode)};
}

inline __m256 power8(__m256 n) {
    __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}

// a * 2^n for whole n in -126 .. 127, and 0 for n = -127.
inline Vec scale_by_power(Vec a, Vec n) { return a * Vec{power8(n.low), power8(n.high)}; }

// Lanes begin .. end - 1 keep their value, the others become `fill`.
inline Vec keep(Vec v, int64_t begin, int64_t end, float fill) {
    float lane[16];
    store(lane, v);
    for (int i = 0; i < 16; i++) lane[i] = i >= begin && i < end ? lane[i] : fill;
    return load(lane);
}

inline float sum(Vec v) {
    __m256 eight = _mm256_add_ps(v.low, v.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline float largest(Vec v) {
    __m256 eight = _mm256_max_ps(v.low, v.high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// Pairs of bf16, one pair a lane.
struct Pairs {
    Vec even, odd;
};

inline Pairs load_pairs(const bf16 *p) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000));
    __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p + 16));
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))},
            {_mm256_castsi256_ps(_mm256_and_si256(low, upper)), _mm256_castsi256_ps(_mm256_and_si256(high, upper))}};
}
inline Pairs splat_pair(const float *p) { return {splat(p[0]), splat(p[1])}; }
inline Pairs join_pairs(const bf16 *even, const bf16 *odd) { return {load(even), load(odd)}; }
inline Vec dot(Vec total, const Pairs &a, const Pairs &b) { return fma(a.odd, b.odd, fma(a.even, b.even, total)); }

inline void transpose8(const uint32_t *const rows[8], int64_t from, uint32_t *out, int64_t stride) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_ps(reinterpret_cast<const float *>(rows[i] + from));
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int half = 0; half < 2; half++) {
            a[i + 2 * half] = _mm256_shuffle_ps(b[i + half], b[i + half + 2], 0x44);
            a[i + 2 * half + 1] = _mm256_shuffle_ps(b[i + half], b[i + half + 2], 0xee);
        }
    // a[4 g + c] now holds, in its 128-bit piece q, column 4 q + c of rows 4 g .. 4 g + 3.
    for (int c = 0; c < 4; c++) {
        auto to = reinterpret_cast<float *>(out);
        _mm256_storeu_ps(to + c * stride, _mm256_permute2f128_ps(a[c], a[c + 4], 0x20));
        _mm256_storeu_ps(to + (c + 4) * stride, _mm256_permute2f128_ps(a[c], a[c + 4], 0x31));
    }
}

// 16 rows of 16 words become 16 columns of a matrix whose rows are `stride` words apart.
inline void transpose16(const uint32_t *const rows[16], uint32_t *out, int64_t stride) {
    for (int row = 0; row < 16; row += 8)
        for (int column = 0; column < 16; column += 8) transpose8(rows + row, column, out + column * stride + row, stride);
}

// Two rows of 32 become pairs: (even[i], odd[i]) for i < 16 in `low`, the others in `high`.
inline void interleave(const bf16 *even, const bf16 *odd, bf16 *__restrict low, bf16 *__restrict high) {
    auto sixteen = [](const bf16 *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); };
    auto join = [](__m256i a, __m256i b, bf16 *out) {
        __m256i first = _mm256_unpacklo_epi16(a, b), second = _mm256_unpackhi_epi16(a, b);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), _mm256_permute2x128_si256(first, second, 0x20));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + 16), _mm256_permute2x128_si256(first, second, 0x31));
    };
    join(sixteen(even), sixteen(odd), low);
    join(sixteen(even + 16), sixteen(odd + 16), high);
}

// Rows are widened once, not in each product.
template <class T>
using Left = float;

// Rows of a product whose sums fit the registers, over a whole panel and over half of one: a pair of
// bf16 takes two registers where a float takes one.
constexpr int kMaxRows = 2;
template <class T>
constexpr int kMaxHalfRows = std::is_same_v<T, float> ? 6 : 5;
