// Attention of few rows: what a token looks at is used so little that packing it would cost more.
// Keys are turned sixteen tokens at a time and used at once, values are read where they lie. Sums
// run in the order of attend_tile, so that a row attends alike here and there.

// What the parts of the work take, in cycles: to turn a register's width of sixteen keys, to use it
// or as much of the values for one row, and to weigh a row.
constexpr int64_t kTurnCycles = 40, kUseCycles = 16, kWeighCycles = 200;

// The rows of a tile, keys first.
template <class T>
class RowByRow {
public:
    RowByRow(const TileRows<T> *tile, int64_t dim) : tile_(tile), bytes_(dim * sizeof(T)) {}

    int64_t lines() const { return tile_ == nullptr ? 0 : 2 * kTileTokens * ceil_div(bytes_, kLineBytes); }

    bool open(const char *&line, const char *&end) {
        if (tile_ == nullptr || row_ == 2 * kTileTokens) return false;
        const T *row = row_ < kTileTokens ? tile_->keys[row_] : tile_->values[row_ - kTileTokens];
        line = reinterpret_cast<const char *>(row), end = line + bytes_;
        row_++;
        return true;
    }

private:
    const TileRows<T> *tile_;
    int64_t bytes_, row_ = 0;
};

template <int R, int H>
inline void add_rows(const float *weights, const float *const *rows, int64_t column, int64_t begin, int64_t end, Vec (&sums)[R][H]) {
    for (int64_t token = begin; token < end; token++) {
        Vec columns[H];
        for (int half = 0; half < H; half++) columns[half] = load(rows[token] + column + half * 16);
        for (int i = 0; i < R; i++) {
            Vec x = splat(weights[i * kTileTokens + token]);
            for (int half = 0; half < H; half++) sums[i][half] = fma(columns[half], x, sums[i][half]);
        }
    }
}

template <int R, int H>
inline void add_rows(const Left<bf16> *weights, const bf16 *const *rows, int64_t column, int64_t begin, int64_t end, Vec (&sums)[R][H]) {
    for (int64_t token = begin; token < end; token += 2) {
        Pairs columns[H];
        for (int half = 0; half < H; half++) {
            int64_t at = column + half * 16;
            columns[half] = join_pairs(rows[token] + at, rows[token + 1] + at);
        }
        for (int i = 0; i < R; i++) {
            Pairs x = splat_pair(weights + i * kTileTokens + token);
            for (int half = 0; half < H; half++) sums[i][half] = dot(sums[i][half], columns[half], x);
        }
    }
}

// One tile for as many of a task's rows as have their sums in registers.
template <class T>
struct FewRows {
    const Task<T> &task;
    const Softmax &softmax;
    int64_t tile;
    const TileRows<T> &rows;
    int64_t first;
    Fetching<RowByRow<T>> &fetching;

    template <int R>
    void attend() const {
        alignas(64) float scores[R * kTileTokens];
        alignas(64) Left<T> weights[R * kTileTokens];
        score<R>(scores);
        for (int i = 0; i < R; i++) {
            fetching.pay(kWeighCycles);
            weigh_row(task, softmax, tile, first + i, scores + i * kTileTokens, weights + i * kTileTokens);
        }
        add_values<R, R <= kMaxRows ? 2 : 1>(weights);
    }

private:
    template <int R>
    void score(float *scores) const {
        constexpr int64_t width = kLineBytes / sizeof(T);
        constexpr int64_t stride = std::is_same_v<T, float> ? kPanel : 16;  // words, as add_products reads
        alignas(64) uint32_t turned[16 * stride];
        const Left<T> *queries = task.queries + first * task.depth;
        for (int64_t token = 0; token < kTileTokens; token += 16) {
            Vec sums[R][1];
            for (int i = 0; i < R; i++) sums[i][0] = splat(0.f);
            for (int64_t k = 0; k < task.depth; k += width) {
                const uint32_t *words[16];
                for (int64_t i = 0; i < 16; i++) words[i] = reinterpret_cast<const uint32_t *>(rows.keys[token + i] + k);
                transpose16(words, turned, stride);
                fetching.pay(kTurnCycles + R * kUseCycles);
                add_products(queries + k, task.depth, reinterpret_cast<const T *>(turned), width, NothingAhead{}, sums);
            }
            for (int i = 0; i < R; i++) store(scores + i * kTileTokens + token, sums[i][0]);
        }
    }

    template <int R, int H>
    void add_values(const Left<T> *weights) const {
        for (int64_t column = 0; column < task.depth; column += 16 * H) {
            float *out = task.outputs + first * task.depth + column;
            Vec sums[R][H];
            for (int i = 0; i < R; i++)
                for (int half = 0; half < H; half++) sums[i][half] = load(out + i * task.depth + half * 16);
            for (int64_t token = 0; token < kTileTokens; token += 16) {
                fetching.pay(R * H * kUseCycles);
                add_rows(weights, rows.values, column, token, token + 16, sums);
            }
            for (int i = 0; i < R; i++)
                for (int half = 0; half < H; half++) store(out + i * task.depth + half * 16, sums[i][half]);
        }
    }
};

template <class T, int... R>
void attend_rows(const FewRows<T> &few, int64_t rows, std::integer_sequence<int, R...>) {
    static constexpr void (FewRows<T>::*table[])() const = {&FewRows<T>::template attend<R + 1>...};
    (few.*table[rows - 1])();
}

// Rows that are whole steps wide, no more than kFewRows of them.
template <class T>
void attend_few(const Task<T> &task) {
    int64_t dim = task.args.kv.head_dim, widths = dim * static_cast<int64_t>(sizeof(T)) / kLineBytes;
    int64_t turns = kTileTokens / 16 * widths, uses = turns + kTileTokens / 16 * dim / 16;
    int64_t cycles = turns * kTurnCycles + task.rows * (uses * kUseCycles + kWeighCycles);
    Softmax softmax = softmax_of(task.args);
    start(task);
    each_tile(task, [&](int64_t tile, const TileRows<T> &rows, const TileRows<T> *next) {
        Fetching<RowByRow<T>> fetching({next, dim}, cycles);
        int64_t first = 0;
        for (int64_t groups = ceil_div(task.rows, kMaxHalfRows<T>); groups > 0; groups--) {
            int64_t here = ceil_div(task.rows - first, groups);
            attend_rows<T>({task, softmax, tile, rows, first, fetching}, here, std::make_integer_sequence<int, kMaxHalfRows<T>>());
            first += here;
        }
        fetching.end();
    });
    finish(task);
}
