// Paged attention over a ragged batch: tiles of 64 positions, online softmax, GQA heads folded
// into rows. A row meets the same tiles in the same order whatever else is in the batch, and a
// tile it may not look at leaves it bit for bit as it was.

constexpr int64_t kTileTokens = 64;
constexpr int64_t kTaskRows = 128;  // rows that share one packing of keys and values
constexpr int64_t kFewRows = 16;  // for which nothing is packed
constexpr float kNothingSeen = -1e30f;

alignas(64) const char zero_row[kMaxHeadDim * sizeof(float)] = {};

// Query heads that share a KV head.
inline int64_t group_of(const AttentionArgs &args) { return args.heads / args.kv.kv_heads; }
inline int64_t tokens_of(const AttentionArgs &args, int64_t sequence) {
    return args.cu_seqlens[sequence + 1] - args.cu_seqlens[sequence];
}

// Rows of a sequence's chunk over the keys of one KV head.
struct Piece {
    int64_t sequence, kv_head, first_row, rows;
};

template <class T>
struct Task {
    const AttentionArgs &args;
    int64_t sequence, kv_head, kv_heads;
    int64_t first_row, rows;  // a row is (token of the chunk, query head of these KV heads)
    int64_t depth;            // head_dim rounded up to whole steps
    Left<T> *queries;         // [rows, depth], zero padded
    float *outputs;           // [rows, depth]
    float *maxima, *sums;     // [rows]
    int64_t *positions;       // [rows]
    const Piece *after = nullptr;  // what this thread probably works on then

    int64_t group() const { return kv_heads * group_of(args); }
    int64_t chunk_tokens() const { return tokens_of(args, sequence); }
    int64_t context() const { return args.context_lens[sequence]; }
    int64_t first_seen(int64_t row) const {
        int64_t begin = args.window == 0 ? 0 : positions[row] - args.window + 1;
        return begin < 0 ? 0 : begin;
    }
    // Offset of a row's head in a [tokens, heads, head_dim] tensor.
    int64_t offset(int64_t row, int64_t token_stride) const {
        int64_t token = args.cu_seqlens[sequence] + (first_row + row) / group();
        int64_t head = kv_head * group_of(args) + (first_row + row) % group();
        return token * token_stride + head * args.kv.head_dim;
    }
};

template <class T>
void start(const Task<T> &task) {
    int64_t dim = task.args.kv.head_dim, group = task.group();
    int64_t before = task.context() - task.chunk_tokens();
    for (int64_t row = 0; row < task.rows; row++) {
        task.positions[row] = before + (task.first_row + row) / group;
        const T *from = static_cast<const T *>(task.args.query) + task.offset(row, task.args.query_stride);
        row_map(task.queries + row * task.depth, dim, [=](auto at) { return at(from); });
        std::memset(task.queries + row * task.depth + dim, 0, (task.depth - dim) * sizeof(Left<T>));
        std::memset(task.outputs + row * task.depth, 0, task.depth * sizeof(float));
        task.maxima[row] = kNothingSeen;
        task.sums[row] = 0;
    }
}

template <class T>
void finish(const Task<T> &task) {
    int64_t dim = task.args.kv.head_dim;
    for (int64_t row = 0; row < task.rows; row++) {
        T *to = static_cast<T *>(task.args.out) + task.offset(row, task.args.heads * dim);
        Vec scale = splat(1.f / task.sums[row]);
        const float *from = task.outputs + row * task.depth;
        row_map(to, dim, [=](auto at) { return at(from) * scale; });
    }
}

// --- one tile of keys and values -------------------------------------------------------------

// Where a tile's keys and values lie.
template <class T>
struct TileRows {
    const T *keys[kTileTokens], *values[kTileTokens];
};

template <class T>
void find_rows(const AttentionArgs &args, int64_t sequence, int64_t kv_head, int64_t tile, TileRows<T> &rows) {
    const KvView &kv = args.kv;
    const int32_t *table = args.block_tables + sequence * args.table_stride;
    auto keys = reinterpret_cast<const T *>(kv.key) + kv_head * kv.head_stride;
    auto values = reinterpret_cast<const T *>(kv.value) + kv_head * kv.head_stride;
    int64_t cached = args.context_lens[sequence] - tile;
    if (cached > kTileTokens) cached = kTileTokens;
    for (int64_t i = 0; i < cached;) {
        int64_t block = (tile + i) / kv.block_tokens, place = tile + i - block * kv.block_tokens;
        int64_t offset = table[block] * kv.block_stride + place * kv.token_stride;
        for (; i < cached && place < kv.block_tokens; i++, place++, offset += kv.token_stride)
            rows.keys[i] = keys + offset, rows.values[i] = values + offset;
    }
    for (int64_t i = cached; i < kTileTokens; i++) rows.keys[i] = rows.values[i] = reinterpret_cast<const T *>(zero_row);
}

inline int64_t first_tile_of(const AttentionArgs &args, const Piece &piece) {
    int64_t first_token = piece.first_row / group_of(args) - tokens_of(args, piece.sequence);
    int64_t begin = args.window == 0 ? 0 : args.context_lens[piece.sequence] + first_token - args.window + 1;
    return begin < 0 ? 0 : begin / kTileTokens * kTileTokens;
}

// Blocks lie apart: without this each of them is waited for.
template <class T>
void fetch_rows(const TileRows<T> &rows, int64_t dim) {
    constexpr int into_l2 = 2;
    for (int64_t i = 0; i < kTileTokens; i++)
        for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) {
            __builtin_prefetch(rows.keys[i] + d, 0, into_l2);
            __builtin_prefetch(rows.values[i] + d, 0, into_l2);
        }
}

// A head row cut to whole steps, through a zero-padded copy where head_dim is not one.
template <class T>
struct PaddedRows {
    T copies[16][kStep];
    const T *operator()(const T *row, int64_t index, int64_t from, int64_t dim) {
        if (from + kStep <= dim) return row + from;
        std::memset(copies[index], 0, sizeof copies[index]);
        std::memcpy(copies[index], row + from, (dim - from) * sizeof(T));
        return copies[index];
    }
};

// Keys become the panels of K^T: [token / 32][step][half][pair of dimensions][16 tokens][2].
inline void pack_keys(const bf16 *const *rows, int64_t dim, int64_t depth, bf16 *out) {
    PaddedRows<bf16> padded;
    for (int64_t t = 0; t < kTileTokens; t += 16)
        for (int64_t k = 0; k < depth; k += kStep) {
            const uint32_t *words[16];
            for (int64_t i = 0; i < 16; i++)
                words[i] = reinterpret_cast<const uint32_t *>(padded(rows[t + i], i, k, dim));
            bf16 *tile = out + t / 32 * depth * kPanel + k * kPanel + t % 32 / 16 * kTile;
            transpose16(words, reinterpret_cast<uint32_t *>(tile), 16);
        }
}

inline void pack_keys(const float *const *rows, int64_t dim, int64_t depth, float *out) {
    PaddedRows<float> padded;
    for (int64_t t = 0; t < kTileTokens; t += 16)
        for (int64_t k = 0; k < depth; k += 16) {
            const uint32_t *words[16];
            for (int64_t i = 0; i < 16; i++) {
                const float *row = padded(rows[t + i], i, k / kStep * kStep, dim) + k % kStep;
                words[i] = reinterpret_cast<const uint32_t *>(row);
            }
            float *corner = out + t / 32 * depth * kPanel + k * kPanel + t % 32;
            transpose16(words, reinterpret_cast<uint32_t *>(corner), kPanel);
        }
}

// Values become the panels of V: [dimension / 32][step of tokens][half][pair of tokens][16][2].
inline void pack_values(const bf16 *const *rows, int64_t dim, int64_t depth, bf16 *out) {
    PaddedRows<bf16> padded;
    for (int64_t d = 0; d < depth; d += kPanel)
        for (int64_t t = 0; t < kTileTokens; t += 2) {
            const bf16 *even = padded(rows[t], 0, d, dim), *odd = padded(rows[t + 1], 1, d, dim);
            bf16 *pair = out + d * kTileTokens + t / kStep * 2 * kTile + t % kStep * 16;
            interleave(even, odd, pair, pair + kTile);
        }
}

inline void pack_values(const float *const *rows, int64_t dim, int64_t depth, float *out) {
    PaddedRows<float> padded;
    for (int64_t d = 0; d < depth; d += kPanel)
        for (int64_t t = 0; t < kTileTokens; t++)
            std::memcpy(out + (d * kTileTokens) + t * kPanel, padded(rows[t], 0, d, dim), kPanel * sizeof(float));
}

// --- softmax ---------------------------------------------------------------------------------

struct Softmax {
    float scale;  // to the base-2 logarithm
    float soft_cap, inverse_cap;
};

inline Softmax softmax_of(const AttentionArgs &args) {
    if (args.soft_cap == 0) return {static_cast<float>(args.scale * kLog2E), 0, 0};
    return {static_cast<float>(args.scale), static_cast<float>(args.soft_cap * kLog2E), static_cast<float>(1 / args.soft_cap)};
}

inline Vec logit(const Softmax &softmax, Vec score) {
    score = score * splat(softmax.scale);
    if (softmax.soft_cap == 0) return score;
    return hyperbolic_tangent(score * splat(softmax.inverse_cap)) * splat(softmax.soft_cap);
}

// Turns a row of scores into weights; lanes outside begin .. end - 1 get weight 0. Returns by
// how much earlier outputs shrink.
template <class W>
float weigh(const Softmax &softmax, const float *scores, W *weights, int64_t begin, int64_t end, float &maximum, float &total) {
    constexpr int kVecs = kTileTokens / 16;
    Vec logits[kVecs], best = splat(maximum);
    for (int i = 0; i < kVecs; i++) {
        logits[i] = logit(softmax, load(scores + i * 16));
        if (begin > 0 || end < kTileTokens) {
            int64_t from = begin - i * 16, to = end - i * 16;
            logits[i] = keep(logits[i], from < 0 ? 0 : from > 16 ? 16 : from, to < 0 ? 0 : to > 16 ? 16 : to, -INFINITY);
        }
        best = larger(best, logits[i]);
    }
    float peak = largest(best);
    Vec part = splat(0.f);
    for (int i = 0; i < kVecs; i++) {
        Vec weight = power_of_two(logits[i] - splat(peak));
        store(weights + i * 16, weight);
        part = part + weight;
    }
    float shrink = 1;
    if (peak != maximum) {
        float lanes[16];
        store(lanes, power_of_two(splat(maximum - peak)));
        shrink = lanes[0];
    }
    total = total * shrink + sum(part);
    maximum = peak;
    return shrink;
}

// One row of a tile, whose earlier output it shrinks.
template <class T>
void weigh_row(const Task<T> &task, const Softmax &softmax, int64_t tile, int64_t row, const float *scores, Left<T> *weights) {
    int64_t begin = task.first_seen(row) - tile, end = task.positions[row] + 1 - tile;
    begin = begin < 0 ? 0 : begin, end = end < 0 ? 0 : end > kTileTokens ? kTileTokens : end;
    float shrink = weigh(softmax, scores, weights, begin, end, task.maxima[row], task.sums[row]);
    if (shrink == 1) return;
    float *line = task.outputs + row * task.depth;
    row_map(line, task.depth, [=](auto at) { return at(const_cast<const float *>(line)) * splat(shrink); });
}

// Whole passes over all rows: what one pass stores has left the core before the next loads it.
template <class T>
void attend_tile(const Task<T> &task, const Softmax &softmax, int64_t tile, const T *keys, const T *values) {
    auto scores = static_cast<float *>(scratch(kScores, kTaskRows * kTileTokens * sizeof(float)));
    auto weights = static_cast<Left<T> *>(scratch(kWeights, kTaskRows * kTileTokens * sizeof(Left<T>)));
    int64_t first = 0;  // rows before it see nothing of this tile
    while (task.positions[first] < tile) first++;
    first = first / 16 * 16;
    int64_t rows = task.rows - first;
    multiply(task.queries + first * task.depth, task.depth, rows, keys, task.depth, kTileTokens,
             scores + first * kTileTokens, kTileTokens, false);
    for (int64_t row = first; row < task.rows; row++)
        weigh_row(task, softmax, tile, row, scores + row * kTileTokens, weights + row * kTileTokens);
    multiply(weights + first * kTileTokens, kTileTokens, rows, values, kTileTokens, task.depth,
             task.outputs + first * task.depth, task.depth, true);
}

// Calls body(tile, rows, next) for each tile that a row sees; next are the rows that are met after
// it, of this task or of another, or null.
template <class T, class Body>
void each_tile(const Task<T> &task, Body body) {
    int64_t end = task.positions[task.rows - 1] + 1;
    int64_t tile = task.first_seen(0) / kTileTokens * kTileTokens;
    TileRows<T> pair[2], *here = pair, *next = pair + 1;
    find_rows(task.args, task.sequence, task.kv_head, tile, *here);
    for (; tile < end; tile += kTileTokens, std::swap(here, next)) {
        bool more = tile + kTileTokens < end;
        if (more)
            find_rows(task.args, task.sequence, task.kv_head, tile + kTileTokens, *next);
        else if (task.after != nullptr)
            find_rows(task.args, task.after->sequence, task.after->kv_head, first_tile_of(task.args, *task.after), *next);
        body(tile, *here, more || task.after != nullptr ? next : nullptr);
    }
}

// The same for a body that packs a tile before it is used: the one after it comes in meanwhile.
template <class T, class Body>
void each_packed_tile(const Task<T> &task, Body body) {
    int64_t dim = task.args.kv.head_dim;
    each_tile(task, [&](int64_t tile, const TileRows<T> &rows, const TileRows<T> *next) {
        if (tile <= task.first_seen(0)) fetch_rows(rows, dim);
        if (next != nullptr) fetch_rows(*next, dim);
        body(tile, rows);
    });
}

template <class T>
void attend_few(const Task<T> &task);

template <class T>
void attend(const Task<T> &task) {
    int64_t dim = task.args.kv.head_dim;
    if (task.rows <= kFewRows && dim == task.depth) return attend_few(task);
    Softmax softmax = softmax_of(task.args);
    T *keys = static_cast<T *>(scratch(kKeys, kTileTokens * task.depth * sizeof(T)));
    T *values = static_cast<T *>(scratch(kValues, kTileTokens * task.depth * sizeof(T)));
    start(task);
    each_packed_tile(task, [&](int64_t tile, const TileRows<T> &rows) {
        pack_keys(rows.keys, dim, task.depth, keys);
        pack_values(rows.values, dim, task.depth, values);
        attend_tile(task, softmax, tile, keys, values);
    });
    finish(task);
}

// What there is to do of the sequences for which `wanted` holds.
template <class Wanted>
std::vector<Piece> pieces_of(const AttentionArgs &args, Wanted wanted) {
    std::vector<Piece> pieces;
    for (int64_t s = 0; s < args.sequences; s++) {
        if (!wanted(s)) continue;
        int64_t all = tokens_of(args, s) * group_of(args);
        // The last rows see the most keys: start with them.
        for (int64_t first = round_up(all, kTaskRows) - kTaskRows; first >= 0; first -= kTaskRows)
            for (int64_t head = 0; head < args.kv.kv_heads; head++)
                pieces.push_back({s, head, first, all - first < kTaskRows ? all - first : kTaskRows});
    }
    return pieces;
}

template <class T, class Wanted>
void attend_sequences(const AttentionArgs &args, void (*attend_task)(const Task<T> &), Wanted wanted) {
    std::vector<Piece> pieces = pieces_of(args, wanted);
    int64_t count = static_cast<int64_t>(pieces.size()), depth = round_up(args.kv.head_dim, kStep);
    parallel(count, [&](int64_t index) {
        const Piece &piece = pieces[index];
        // An AMX tile reads whole sixteens of rows; what it makes of the surplus is not used.
        int64_t room = round_up(piece.rows, 16);
        float maxima[kTaskRows], sums[kTaskRows];
        int64_t positions[kTaskRows];
        auto outputs = static_cast<float *>(scratch(kOutput, room * depth * sizeof(float)));
        auto queries = static_cast<Left<T> *>(scratch(kQuery, room * depth * sizeof(Left<T>)));
        const Piece *after = index + threads() < count ? &piece + threads() : nullptr;
        attend_task({args, piece.sequence, piece.kv_head, 1, piece.first_row, piece.rows, depth, queries, outputs, maxima, sums, positions, after});
    });
}

template <class T>
void attention_of(const AttentionArgs &args) {
    attend_sequences<T>(args, attend<T>, [](int64_t) { return true; });
}
