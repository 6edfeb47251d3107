// Norms and activations: one pass over memory, fp32 inside, one rounding at the end.

constexpr int64_t kElementGrain = 1 << 14;  // elements below which a second thread does not pay

inline int64_t rows_a_task(int64_t features) { return features < kElementGrain ? kElementGrain / features : 1; }

// Sum over a row of f(lanes), in a fixed order.
template <class T, class F>
inline float row_sum(const T *x, int64_t n, F f) {
    Vec a = splat(0.f), b = a;
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) a = f(load(x + i), a), b = f(load(x + i + 16), b);
    for (; i + 16 <= n; i += 16) a = f(load(x + i), a);
    if (i < n) b = keep(f(load(x + i, n - i), b), 0, n - i, 0.f) + keep(b, n - i, 16, 0.f);
    return sum(a + b);
}

// y = f(x, i) for a row, f working on the sixteen lanes from i.
template <class T, class F>
inline void row_map(T *y, int64_t n, F f) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store(y + i, f([i](auto *p) { return load(p + i); }));
    if (i < n) store(y + i, f([i, n](auto *p) { return load(p + i, n - i); }), n - i);
}

template <class T>
void norm_row(const NormArgs &args, int64_t row) {
    int64_t n = args.features;
    const T *x = static_cast<const T *>(args.x) + row * n;
    T *y = static_cast<T *>(args.y) + row * n;
    if (args.residual != nullptr) {
        T *residual = static_cast<T *>(args.residual) + row * n;
        row_map(residual, n, [=](auto at) { return at(residual) + at(x); });
        x = residual;
    }
    auto squares = [](Vec v, Vec total) { return fma(v, v, total); };
    if (args.bias == nullptr) {
        Vec scale = splat(1.f / std::sqrt(row_sum(x, n, squares) / n + static_cast<float>(args.eps)));
        row_map(y, n, [&](auto at) { return at(x) * scale * at(args.weight); });
        return;
    }
    Vec mean = splat(row_sum(x, n, [](Vec v, Vec total) { return total + v; }) / n);
    auto spread = [&](Vec v, Vec total) { return squares(v - mean, total); };
    Vec scale = splat(1.f / std::sqrt(row_sum(x, n, spread) / n + static_cast<float>(args.eps)));
    row_map(y, n, [&](auto at) { return fma((at(x) - mean) * scale, at(args.weight), at(args.bias)); });
}

template <class T>
void activation_row(const ActivationArgs &args, int64_t row) {
    int64_t n = args.features;
    const T *x = static_cast<const T *>(args.x) + row * n * (1 + args.gated), *up = x + n;
    T *y = static_cast<T *>(args.y) + row * n;
    if (args.gated)
        row_map(y, n, [&](auto at) { return activate(at(x), args.kind) * at(up); });
    else
        row_map(y, n, [&](auto at) { return activate(at(x), args.kind); });
}

template <class Args>
void each_row(const Args &args, void (*body)(const Args &, int64_t)) {
    parallel_ranges(args.rows, rows_a_task(args.features), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) body(args, row);
    });
}

void norm(const NormArgs &args) { each_row(args, args.dtype == kBfloat16 ? norm_row<bf16> : norm_row<float>); }

void activation(const ActivationArgs &args) {
    each_row(args, args.dtype == kBfloat16 ? activation_row<bf16> : activation_row<float>);
}

// --- RoPE and the KV store -------------------------------------------------------------------

// Norms (if asked) and turns one head; `to` may be `from`.
template <class T>
void place_head(const T *from, T *to, const float *weight, const float *turn, const PlaceArgs &args) {
    int64_t dim = args.kv.head_dim, half = turn == nullptr ? 0 : args.rotary_dim / 2;
    float normed[kMaxHeadDim];
    Vec scale = splat(1.f);
    if (weight != nullptr) {
        auto squares = [](Vec v, Vec total) { return fma(v, v, total); };
        scale = splat(1.f / std::sqrt(row_sum(from, dim, squares) / dim + static_cast<float>(args.eps)));
        row_map(normed, dim, [&](auto at) { return at(from) * scale * at(weight); });
    } else {
        row_map(normed, dim, [&](auto at) { return at(from); });
    }
    const float *first = normed, *second = normed + half, *cosines = turn, *sines = turn + half;
    row_map(to, half, [&](auto at) { return at(first) * at(cosines) - at(second) * at(sines); });
    row_map(to + half, half, [&](auto at) { return fma(at(second), at(cosines), at(first) * at(sines)); });
    const float *rest = normed + 2 * half;
    row_map(to + 2 * half, dim - 2 * half, [&](auto at) { return at(rest); });
}

template <class T>
void place_token(const PlaceArgs &args, int64_t token) {
    const KvView &kv = args.kv;
    T *head = static_cast<T *>(args.qkv) + token * (args.heads + 2 * kv.kv_heads) * kv.head_dim;
    const float *turn = args.rotary;
    if (turn != nullptr) turn += args.positions[token] * args.rotary_dim;
    if (turn != nullptr || args.query_norm != nullptr)
        for (int64_t i = 0; i < args.heads; i++)
            place_head(head + i * kv.head_dim, head + i * kv.head_dim, args.query_norm, turn, args);
    const T *key = head + args.heads * kv.head_dim, *value = key + kv.kv_heads * kv.head_dim;
    int64_t block = args.slots[token] / kv.block_tokens, place = args.slots[token] % kv.block_tokens;
    int64_t target = block * kv.block_stride + place * kv.token_stride;
    for (int64_t i = 0; i < kv.kv_heads; i++, target += kv.head_stride) {
        place_head(key + i * kv.head_dim, reinterpret_cast<T *>(kv.key) + target, args.key_norm, turn, args);
        std::memcpy(reinterpret_cast<T *>(kv.value) + target, value + i * kv.head_dim, kv.head_dim * sizeof(T));
    }
}

void place(const PlaceArgs &args) {
    auto body = args.dtype == kBfloat16 ? place_token<bf16> : place_token<float>;
    int64_t features = (args.heads + 2 * args.kv.kv_heads) * args.kv.head_dim;
    parallel_ranges(args.tokens, rows_a_task(features), [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; token++) body(args, token);
    });
}

// --- the highest of a row --------------------------------------------------------------------

constexpr int64_t kPeakPiece = 1024;  // that the highest is looked for in again, to tell its place

// Adds up to NaN in `sound` what is NaN, or endless.
inline float peak_of(const float *x, int64_t n, Vec &sound) {
    const Vec least = splat(-INFINITY), zero = splat(0.f), finite = splat(std::numeric_limits<float>::lowest());
    Vec peak = least;
    for (int64_t i = 0, left; (left = n - i) > 0; i += 16) {
        Vec here = left < 16 ? keep(load(x + i, left), 0, left, -INFINITY) : load(x + i);
        peak = larger(peak, here);
        sound = fma(larger(finite, here), zero, sound);  // a NaN stands second, and stays
    }
    return largest(peak);
}

void highest_of(const HighestArgs &args, int64_t row) {
    const float *x = args.rows + row * args.row_stride;
    Vec sound = splat(0.f);
    float best = -INFINITY;
    int64_t place = 0;
    for (int64_t i = 0; i < args.columns; i += kPeakPiece) {
        int64_t left = args.columns - i;
        float peak = peak_of(x + i, left < kPeakPiece ? left : kPeakPiece, sound);
        if (peak > best) best = peak, place = i;
    }
    bool whole = best == INFINITY || sum(sound) == 0;
    for (; whole && x[place] != best; place++) {}
    args.maxima[row] = whole ? best : NAN;
    args.places[row] = place;
}

void highest(const HighestArgs &args) {
    parallel_ranges(args.count, rows_a_task(args.columns), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) highest_of(args, row);
    });
}
