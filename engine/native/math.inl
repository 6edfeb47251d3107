// Elementary functions on sixteen lanes, the same polynomial on every instruction set.

// 2^x to about 1e-7; exactly 0 where it is too small.
inline Vec power_of_two(Vec x) {
    x = smaller(larger(x, splat(-127.f)), splat(127.f));
    Vec whole = nearest(x), f = x - whole;
    Vec p = fma(f, splat(1.54035304e-4f), splat(1.33335581e-3f));
    p = fma(p, f, splat(9.61812911e-3f));
    p = fma(p, f, splat(5.55041087e-2f));
    p = fma(p, f, splat(0.240226507f));
    p = fma(p, f, splat(0.693147181f));
    return scale_by_power(fma(p, f, splat(1.f)), whole);
}

constexpr float kLog2E = 1.44269504f;

inline Vec sigmoid(Vec x) { return splat(1.f) / (splat(1.f) + power_of_two(x * splat(-kLog2E))); }
inline Vec hyperbolic_tangent(Vec x) { return splat(2.f) * sigmoid(x + x) - splat(1.f); }

inline Vec activate(Vec x, int64_t kind) {
    if (kind == kSilu) return x * sigmoid(x);
    if (kind == kRelu) return larger(x, splat(0.f));
    Vec cubic = fma(x * x, splat(0.044715f), splat(1.f)) * x;
    return x * sigmoid(cubic * splat(2.f * 0.797884561f));
}
