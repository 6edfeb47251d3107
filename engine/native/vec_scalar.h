// Sixteen fp32 lanes in plain C++, for machines that none of the other files know.
struct Vec {
    float lane[16];
};

inline Vec splat(float value) {
    Vec out;
    for (float &lane : out.lane) lane = value;
    return out;
}

template <class F>
inline Vec lanewise(F f) {
    Vec out;
    for (int i = 0; i < 16; i++) out.lane[i] = f(i);
    return out;
}

inline float widen(bf16 value) {
    uint32_t bits = static_cast<uint32_t>(value) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline bf16 narrow(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0;
    return static_cast<bf16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline Vec load(const float *p) { return lanewise([=](int i) { return p[i]; }); }
inline Vec load(const bf16 *p) { return lanewise([=](int i) { return widen(p[i]); }); }
inline Vec load(const float *p, int64_t n) { return lanewise([=](int i) { return i < n ? p[i] : 0.f; }); }
inline Vec load(const bf16 *p, int64_t n) { return lanewise([=](int i) { return i < n ? widen(p[i]) : 0.f; }); }
inline void store(float *p, Vec v) { std::memcpy(p, v.lane, 64); }
inline void store(bf16 *p, Vec v) { for (int i = 0; i < 16; i++) p[i] = narrow(v.lane[i]); }
inline void store(float *p, Vec v, int64_t n) { for (int i = 0; i < n; i++) p[i] = v.lane[i]; }
inline void store(bf16 *p, Vec v, int64_t n) { for (int i = 0; i < n; i++) p[i] = narrow(v.lane[i]); }

inline Vec operator+(Vec a, Vec b) { return lanewise([&](int i) { return a.lane[i] + b.lane[i]; }); }
inline Vec operator-(Vec a, Vec b) { return lanewise([&](int i) { return a.lane[i] - b.lane[i]; }); }
inline Vec operator*(Vec a, Vec b) { return lanewise([&](int i) { return a.lane[i] * b.lane[i]; }); }
inline Vec operator/(Vec a, Vec b) { return lanewise([&](int i) { return a.lane[i] / b.lane[i]; }); }
inline Vec fma(Vec a, Vec b, Vec c) { return lanewise([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; }); }
inline Vec larger(Vec a, Vec b) { return lanewise([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; }); }
inline Vec smaller(Vec a, Vec b) { return lanewise([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; }); }
inline Vec nearest(Vec a) { return lanewise([&](int i) { return std::nearbyint(a.lane[i]); }); }

// a * 2^n for whole n in -126 .. 127, and 0 for n = -127.
inline Vec scale_by_power(Vec a, Vec n) {
    return lanewise([&](int i) {
        uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n.lane[i]) + 127) << 23;
        float power;
        std::memcpy(&power, &bits, 4);
        return a.lane[i] * power;
    });
}

// Lanes begin .. end - 1 keep their value, the others become `fill`.
inline Vec keep(Vec v, int64_t begin, int64_t end, float fill) {
    return lanewise([&](int i) { return i >= begin && i < end ? v.lane[i] : fill; });
}

inline float sum(Vec v) {
    float total = 0;
    for (float lane : v.lane) total += lane;
    return total;
}

inline float largest(Vec v) {
    float best = v.lane[0];
    for (float lane : v.lane) best = lane > best ? lane : best;
    return best;
}

// Pairs of bf16, one pair a lane.
struct Pairs {
    Vec even, odd;
};

inline Pairs load_pairs(const bf16 *p) {
    return {lanewise([=](int i) { return widen(p[2 * i]); }), lanewise([=](int i) { return widen(p[2 * i + 1]); })};
}
inline Pairs splat_pair(const float *p) { return {splat(p[0]), splat(p[1])}; }
inline Pairs join_pairs(const bf16 *even, const bf16 *odd) { return {load(even), load(odd)}; }
inline Vec dot(Vec total, const Pairs &a, const Pairs &b) { return fma(a.odd, b.odd, fma(a.even, b.even, total)); }

// 16 rows of 16 words become 16 columns of a matrix whose rows are `stride` words apart.
inline void transpose16(const uint32_t *const rows[16], uint32_t *out, int64_t stride) {
    for (int column = 0; column < 16; column++)
        for (int row = 0; row < 16; row++) std::memcpy(out + column * stride + row, rows[row] + column, 4);
}

// Two rows of 32 become pairs: (even[i], odd[i]) for i < 16 in `low`, the others in `high`.
inline void interleave(const bf16 *even, const bf16 *odd, bf16 *__restrict low, bf16 *__restrict high) {
    for (int i = 0; i < 16; i++) low[2 * i] = even[i], low[2 * i + 1] = odd[i];
    for (int i = 0; i < 16; i++) high[2 * i] = even[16 + i], high[2 * i + 1] = odd[16 + i];
}

// Rows are widened once, not in each product.
template <class T>
using Left = float;

// Rows of a product whose sums fit the registers, over a whole panel and over half of one.
constexpr int kMaxRows = 2;
template <class T>
constexpr int kMaxHalfRows = 2;
