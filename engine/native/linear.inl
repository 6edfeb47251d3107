// y = x W^T + bias on packed or plain weights.

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

// x as it is, or a copy whose rows are zero padded to whole steps.
template <class T>
const T *padded_input(const LinearArgs &args, int64_t &stride) {
    const T *x = static_cast<const T *>(args.x);
    int64_t depth = args.in_features;
    stride = args.x_stride;
    if (sizeof(T) == 4 || depth % kStep == 0) return x;
    int64_t width = round_up(depth, kStep);
    T *copy = static_cast<T *>(scratch(kInput, args.rows * width * sizeof(T)));
    for (int64_t i = 0; i < args.rows; i++) {
        std::memcpy(copy + i * width, x + i * stride, depth * sizeof(T));
        std::memset(copy + i * width + depth, 0, (width - depth) * sizeof(T));
    }
    stride = width;
    return copy;
}

constexpr int64_t kRowBlock = 8 * kMaxRows;
constexpr int64_t kTaskWeightBytes = 128 << 10;

template <class T>
void linear_packed(const LinearArgs &args) {
    int64_t stride;
    const T *x = padded_input<T>(args, stride);
    const T *weight = static_cast<const T *>(args.weight);
    int64_t size = panel_elements(weight, args.in_features), panels = ceil_div(args.out_features, kPanel);
    int64_t grain = ceil_div(kTaskWeightBytes, size * static_cast<int64_t>(sizeof(T)));
    int64_t groups = ceil_div(panels, grain);
    parallel(groups, [&](int64_t group) {
        alignas(64) float sums[kRowBlock * kPanel];
        int64_t end = (group + 1) * grain < panels ? (group + 1) * grain : panels;
        for (int64_t panel = group * grain; panel < end; panel++)
            for (int64_t row = 0; row < args.rows; row += kRowBlock) {
                int64_t rows = args.rows - row < kRowBlock ? args.rows - row : kRowBlock;
                multiply_panel<T>({x + row * stride, stride, weight + panel * size, args.in_features, sums, kPanel, false}, rows);
                emit<T>(args, sums, row, rows, panel * kPanel);
            }
    });
}

// --- plain weights: rows of W against rows of x, lanes along the depth ------------------------

template <int M, int N>
inline void add_dots(const bf16 *x, int64_t ldx, const bf16 *w, int64_t depth, Vec (&sums)[M][N]) {
    int64_t k = 0;
    for (; k + kStep <= depth; k += kStep) {
        Pairs columns[N];
        for (int n = 0; n < N; n++) columns[n] = load_pairs(w + n * depth + k);
        for (int m = 0; m < M; m++) {
            Pairs row = load_pairs(x + m * ldx + k);
            for (int n = 0; n < N; n++) sums[m][n] = dot(sums[m][n], columns[n], row);
        }
    }
    for (int64_t left; (left = depth - k) > 0; k += 16)
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++)
                sums[m][n] = fma(load(x + m * ldx + k, left < 16 ? left : 16),
                                 load(w + n * depth + k, left < 16 ? left : 16), sums[m][n]);
}

template <int M, int N>
inline void add_dots(const float *x, int64_t ldx, const float *w, int64_t depth, Vec (&sums)[M][N]) {
    for (int64_t k = 0, left; (left = depth - k) > 0; k += 16)
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++)
                sums[m][n] = left >= 16 ? fma(load(x + m * ldx + k), load(w + n * depth + k), sums[m][n])
                                        : fma(load(x + m * ldx + k, left), load(w + n * depth + k, left), sums[m][n]);
}

template <class T, class Y, int M, int N>
void dots(const LinearArgs &args, const T *x, int64_t row, int64_t column) {
    Vec sums[M][N];
    for (auto &line : sums)
        for (Vec &v : line) v = splat(0.f);
    const T *weight = static_cast<const T *>(args.weight) + column * args.in_features;
    add_dots(x + row * args.x_stride, args.x_stride, weight, args.in_features, sums);
    for (int m = 0; m < M; m++) {
        Y *y = static_cast<Y *>(args.y) + (row + m) * args.out_features + column;
        const T *bias = args.bias == nullptr ? nullptr : static_cast<const T *>(args.bias) + column;
        for (int n = 0; n < N; n++) {
            Vec total = splat(sum(sums[m][n]));
            store(y + n, bias == nullptr ? total : total + load(bias + n, 1), 1);
        }
    }
}

template <class T, class Y>
void linear_plain_as(const LinearArgs &args) {
    constexpr int kRows = kMaxRows > 4 ? 4 : 1, kColumns = 4;
    const T *x = static_cast<const T *>(args.x);
    parallel_ranges(args.out_features, 256, [&](int64_t begin, int64_t end) {
        for (int64_t column = begin; column < end;) {
            bool wide = column + kColumns <= end;
            for (int64_t row = 0; row < args.rows;) {
                bool tall = row + kRows <= args.rows;
                auto body = wide ? tall ? dots<T, Y, kRows, kColumns> : dots<T, Y, 1, kColumns>
                                 : tall ? dots<T, Y, kRows, 1> : dots<T, Y, 1, 1>;
                body(args, x, row, column);
                row += tall ? kRows : 1;
            }
            column += wide ? kColumns : 1;
        }
    });
}

template <class T>
void linear_plain(const LinearArgs &args) {
    args.wide ? linear_plain_as<T, float>(args) : linear_plain_as<T, T>(args);
}

template <class T>
void linear_of(const LinearArgs &args) {
    args.plain ? linear_plain<T>(args) : linear_packed<T>(args);
}
