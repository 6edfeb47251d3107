// Rows of A times packed panels. Each sum runs over the depth in one fixed order, so a row's
// result does not depend on the rows beside it.

constexpr int64_t kPrefetchBytes = 4096;

inline void prefetch_ahead(const void *p) { __builtin_prefetch(static_cast<const char *>(p) + kPrefetchBytes); }

inline int64_t panel_elements(const bf16 *, int64_t depth) { return round_up(depth, kStep) * kPanel; }
inline int64_t panel_elements(const float *, int64_t depth) { return depth * kPanel; }

template <int R>
inline void add_products(const bf16 *a, int64_t lda, const bf16 *panel, int64_t depth, Vec (&sums)[R][2]) {
    for (int64_t k = 0; k < depth; k += kStep, panel += 2 * kTile)
        for (int64_t pair = 0; pair < 16; pair++) {
            Pairs left = load_pairs(panel + pair * 32), right = load_pairs(panel + kTile + pair * 32);
            prefetch_ahead(panel + pair * 32);
            prefetch_ahead(panel + kTile + pair * 32);
            for (int i = 0; i < R; i++) {
                Pairs x = splat_pair(a + i * lda + k + 2 * pair);
                sums[i][0] = dot(sums[i][0], left, x);
                sums[i][1] = dot(sums[i][1], right, x);
            }
        }
}

template <int R>
inline void add_products(const float *a, int64_t lda, const float *panel, int64_t depth, Vec (&sums)[R][2]) {
    for (int64_t k = 0; k < depth; k++, panel += kPanel) {
        Vec left = load(panel), right = load(panel + 16);
        prefetch_ahead(panel);
        prefetch_ahead(panel + 16);
        for (int i = 0; i < R; i++) {
            Vec x = splat(a[i * lda + k]);
            sums[i][0] = fma(left, x, sums[i][0]);
            sums[i][1] = fma(right, x, sums[i][1]);
        }
    }
}

template <class T>
struct Panel {
    const T *a;
    int64_t lda;
    const T *panel;
    int64_t depth;
    float *c;  // [rows, 32]
    int64_t ldc;
    bool accumulate;
};

template <class T, int R>
void some_rows(const Panel<T> &p) {
    Vec sums[R][2];
    for (int i = 0; i < R; i++)
        for (int half = 0; half < 2; half++)
            sums[i][half] = p.accumulate ? load(p.c + i * p.ldc + half * 16) : splat(0.f);
    add_products(p.a, p.lda, p.panel, p.depth, sums);
    for (int i = 0; i < R; i++)
        for (int half = 0; half < 2; half++) store(p.c + i * p.ldc + half * 16, sums[i][half]);
}

template <class T, int... R>
void dispatch_rows(const Panel<T> &p, int64_t rows, std::integer_sequence<int, R...>) {
    static constexpr void (*table[])(const Panel<T> &) = {some_rows<T, R + 1>...};
    table[rows - 1](p);
}

template <class T>
void multiply_panel(Panel<T> p, int64_t rows) {
    for (; rows > 0; rows -= kMaxRows, p.a += kMaxRows * p.lda, p.c += kMaxRows * p.ldc)
        dispatch_rows(p, rows < kMaxRows ? rows : kMaxRows, std::make_integer_sequence<int, kMaxRows>());
}

template <class T>
void multiply(const T *a, int64_t lda, int64_t rows, const T *packed, int64_t depth, int64_t columns, float *c, int64_t ldc,
              bool accumulate) {
    for (int64_t n = 0; n < columns; n += kPanel, packed += panel_elements(packed, depth))
        multiply_panel<T>({a, lda, packed, depth, c + n, ldc, accumulate}, rows);
}
