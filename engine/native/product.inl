// Rows of A times packed panels. Each sum runs over the depth in one fixed order, so a row's
// result does not depend on the rows beside it.

// What is read later is brought into L2 meanwhile, in the order of addresses, not of use: halves of
// a panel that alternate come a third slower.
struct Upcoming {
    const char *line;
    int64_t step;  // bytes, each time

    template <int H>
    void fetch() {
        constexpr int into_l2 = 2;
        for (int i = 0; i < H; i++) __builtin_prefetch(line + i * 64, 0, into_l2);
        line += step;
    }
};

struct NothingAhead {
    template <int H>
    void fetch() const {}
};

constexpr int64_t kAheadBytes = 8192;
constexpr int64_t kTurnBytes = 128;  // of a panel that a turn of the loops below reads, both halves

inline int64_t panel_elements(const bf16 *, int64_t depth) { return round_up(depth, kStep) * kPanel; }
inline int64_t panel_elements(const float *, int64_t depth) { return depth * kPanel; }

inline int64_t half_panel(const bf16 *) { return kTile; }
inline int64_t half_panel(const float *) { return kPanel / 2; }

template <int R, int H, class Ahead>
inline void add_products(const Left<bf16> *a, int64_t lda, const bf16 *panel, int64_t depth, Ahead ahead, Vec (&sums)[R][H]) {
    for (int64_t k = 0; k < depth; k += kStep, panel += 2 * kTile)
        for (int64_t pair = 0; pair < 16; pair++) {
            Pairs columns[H];
            for (int half = 0; half < H; half++) columns[half] = load_pairs(panel + half * kTile + pair * 32);
            ahead.template fetch<H>();
            for (int i = 0; i < R; i++) {
                Pairs x = splat_pair(a + i * lda + k + 2 * pair);
                for (int half = 0; half < H; half++) sums[i][half] = dot(sums[i][half], columns[half], x);
            }
        }
}

template <int R, int H, class Ahead>
inline void add_products(const float *a, int64_t lda, const float *panel, int64_t depth, Ahead ahead, Vec (&sums)[R][H]) {
    for (int64_t k = 0; k < depth; k++, panel += kPanel) {
        Vec columns[H];
        for (int half = 0; half < H; half++) columns[half] = load(panel + half * 16);
        ahead.template fetch<H>();
        for (int i = 0; i < R; i++) {
            Vec x = splat(a[i * lda + k]);
            for (int half = 0; half < H; half++) sums[i][half] = fma(columns[half], x, sums[i][half]);
        }
    }
}

template <class T>
struct Panel {
    const Left<T> *a;
    int64_t lda;
    const T *panel;
    int64_t depth;
    float *c;  // [rows, 32]
    int64_t ldc;
    bool accumulate;
    Upcoming upcoming = {};
};

// R rows times H halves of a panel.
template <class T, int H, int R>
void some_rows(const Panel<T> &p) {
    Vec sums[R][H];
    for (int i = 0; i < R; i++)
        for (int half = 0; half < H; half++)
            sums[i][half] = p.accumulate ? load(p.c + i * p.ldc + half * 16) : splat(0.f);
    add_products(p.a, p.lda, p.panel, p.depth, p.upcoming, sums);
    for (int i = 0; i < R; i++)
        for (int half = 0; half < H; half++) store(p.c + i * p.ldc + half * 16, sums[i][half]);
}

template <class T, int H, int... R>
void dispatch_rows(const Panel<T> &p, int64_t rows, std::integer_sequence<int, R...>) {
    static constexpr void (*table[])(const Panel<T> &) = {some_rows<T, H, R + 1>...};
    table[rows - 1](p);
}

// In groups of rows that are as even as can be: small ones leave the arithmetic units waiting.
// `share` bytes further on is what the next group brings in.
template <class T, int H, int Most>
void multiply_halves(Panel<T> p, int64_t rows, int64_t share) {
    for (int64_t groups = ceil_div(rows, Most); groups > 0; groups--) {
        int64_t here = ceil_div(rows, groups);
        dispatch_rows<T, H>(p, here, std::make_integer_sequence<int, Most>());
        rows -= here, p.a += here * p.lda, p.c += here * p.ldc, p.upcoming.line += share;
    }
}

template <class T>
void multiply_panel(Panel<T> p, int64_t rows) {
    auto here = reinterpret_cast<const char *>(p.panel);
    if (rows <= kMaxRows || kMaxHalfRows<T> <= kMaxRows) {
        p.upcoming = {here + kAheadBytes, kTurnBytes};
        return multiply_halves<T, 2, kMaxRows>(p, rows, 0);
    }
    // Each pass over this panel brings in its share of the next one.
    int64_t bytes = panel_elements(p.panel, p.depth) * static_cast<int64_t>(sizeof(T));
    int64_t groups = ceil_div(rows, kMaxHalfRows<T>), step = ceil_div(kTurnBytes, 2 * groups);
    int64_t share = bytes / kTurnBytes * step;
    p.upcoming = {here + bytes, step};
    multiply_halves<T, 1, kMaxHalfRows<T>>(p, rows, share);
    p.panel += half_panel(p.panel), p.c += kPanel / 2, p.upcoming.line += groups * share;
    multiply_halves<T, 1, kMaxHalfRows<T>>(p, rows, share);
}

template <class T>
void multiply(const Left<T> *a, int64_t lda, int64_t rows, const T *packed, int64_t depth, int64_t columns, float *c, int64_t ldc,
              bool accumulate) {
    for (int64_t n = 0; n < columns; n += kPanel, packed += panel_elements(packed, depth))
        multiply_panel<T>({a, lda, packed, depth, c + n, ldc, accumulate}, rows);
}

// --- a row by itself, times the first of several panels that lie `size` elements apart -----------

// fp32 is multiplied so fast that the processor foresees by itself what is read.
template <int H>
inline void add_row(const float *a, const float *panel, int64_t size, int64_t depth, Vec (&sums)[H]) {
    for (int64_t k = 0; k < depth; k++, panel += kPanel) {
        Vec x = splat(a[k]);
        for (int half = 0; half < H; half++) sums[half] = fma(load(panel + half / 2 * size + half % 2 * 16), x, sums[half]);
    }
}

// It takes twice as long for as many bytes of bf16, and is told.
template <int H>
inline void add_row(const Left<bf16> *a, const bf16 *panel, int64_t size, int64_t depth, Vec (&sums)[H]) {
    constexpr int64_t ahead = 2048;
    constexpr int into_l2 = 2;
    const bf16 *line = panel + ahead;
    for (int64_t k = 0; k < depth; k += kStep, panel += 2 * kTile)
        for (int64_t pair = 0; pair < 16; pair++, line += 64) {
            Pairs x = splat_pair(a + k + 2 * pair);
            for (int half = 0; half < H; half++) {
                __builtin_prefetch(line + half / 2 * size + half % 2 * 32, 0, into_l2);
                sums[half] = dot(sums[half], load_pairs(panel + half / 2 * size + half % 2 * kTile + pair * 32), x);
            }
        }
}

// Memory is read faster in several places than in one.
template <class T, int Panels>
void multiply_abreast(const Left<T> *a, const T *packed, int64_t depth, float *c) {
    Vec sums[2 * Panels];
    for (Vec &one : sums) one = splat(0.f);
    add_row(a, packed, panel_elements(packed, depth), depth, sums);
    for (int half = 0; half < 2 * Panels; half++) store(c + half * 16, sums[half]);
}
