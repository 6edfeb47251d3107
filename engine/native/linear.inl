// y = x W^T + bias on packed weights.

// Writes sums [rows, 32] of panel columns first .. first + 31 out.
template <class T, class Y>
void emit_as(const LinearArgs &args, const float *sums, int64_t row, int64_t rows, int64_t first) {
    int64_t columns = args.out_features - first;
    const T *bias = args.bias == nullptr ? nullptr : static_cast<const T *>(args.bias) + first;
    for (int64_t i = 0; i < rows; i++, sums += kPanel) {
        Y *y = static_cast<Y *>(args.y) + (row + i) * args.out_features + first;
        row_map(y, columns < kPanel ? columns : kPanel,
                [=](auto at) { return bias == nullptr ? at(sums) : at(sums) + at(bias); });
    }
}

template <class T>
void emit(const LinearArgs &args, const float *sums, int64_t row, int64_t rows, int64_t first) {
    auto body = args.wide ? emit_as<T, float> : emit_as<T, T>;
    body(args, sums, row, rows, first);
}

// x as it is, or a copy as products take it, its rows zero padded to whole steps.
template <class T>
const Left<T> *rows_of(const LinearArgs &args, int64_t &stride) {
    const T *x = static_cast<const T *>(args.x);
    int64_t depth = args.in_features;
    stride = args.x_stride;
    if constexpr (std::is_same_v<T, Left<T>>)
        if (std::is_same_v<T, float> || depth % kStep == 0) return x;
    int64_t width = round_up(depth, kStep), from = args.x_stride;
    auto copy = static_cast<Left<T> *>(scratch(kInput, args.rows * width * sizeof(Left<T>)));
    parallel_ranges(args.rows, rows_a_task(width), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            row_map(copy + i * width, depth, [&](auto at) { return at(x + i * from); });
            std::memset(copy + i * width + depth, 0, (width - depth) * sizeof(Left<T>));
        }
    });
    stride = width;
    return copy;
}

template <class T>
constexpr int64_t kRowBlock = 80 / kMaxHalfRows<T> * kMaxHalfRows<T>;  // whose sums leave most of L1 free
constexpr int64_t kTaskWeightBytes = 128 << 10;
constexpr int64_t kSlabDepth = 256;
constexpr int kAbreast = 2;

// Where rows pass a panel more than once they do so slab by slab, which stay in L1 meanwhile.
template <class T>
void multiply_rows(const LinearArgs &args, const Left<T> *x, int64_t stride, const T *panel, int64_t rows, float *sums) {
    int64_t slab = rows <= kMaxRows ? args.in_features : kSlabDepth;
    for (int64_t k = 0; k < args.in_features; k += slab) {
        int64_t depth = args.in_features - k < slab ? args.in_features - k : slab;
        multiply_panel<T>({x + k, stride, panel + k * kPanel, depth, sums, kPanel, k > 0}, rows);
    }
}

template <class T>
void linear_of(const LinearArgs &args) {
    int64_t stride;
    const Left<T> *x = rows_of<T>(args, stride);
    const T *weight = static_cast<const T *>(args.weight);
    int64_t depth = args.in_features, size = panel_elements(weight, depth), panels = ceil_div(args.out_features, kPanel);
    int64_t grain = round_up(ceil_div(kTaskWeightBytes, size * static_cast<int64_t>(sizeof(T))), kAbreast);
    int64_t groups = ceil_div(panels, grain);
    parallel(groups, [&](int64_t group) {
        alignas(64) float sums[kRowBlock<T> * kPanel];
        int64_t first = group * grain, end = first + grain < panels ? first + grain : panels;
        if (args.rows == 1)
            for (; first + kAbreast <= end; first += kAbreast) {
                multiply_abreast<T, kAbreast>(x, weight + first * size, depth, sums);
                for (int i = 0; i < kAbreast; i++) emit<T>(args, sums + i * kPanel, 0, 1, (first + i) * kPanel);
            }
        for (int64_t row = 0; row < args.rows; row += kRowBlock<T>)
            for (int64_t panel = first; panel < end; panel++) {
                int64_t rows = args.rows - row < kRowBlock<T> ? args.rows - row : kRowBlock<T>;
                multiply_rows<T>(args, x + row * stride, stride, weight + panel * size, rows, sums);
                emit<T>(args, sums, row, rows, panel * kPanel);
            }
    });
}
