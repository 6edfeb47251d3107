// One token of a sequence against several KV heads at once, in AMX tiles. Keys are met as they lie
// in the cache, as rows of A. The queries are B: a head's stand in columns of their own, zero in
// those of the others, so that the scores of all heads fill one tile, a lane a row. The weights are
// A, zero in the rows of other heads. Sums run in the order of attend_tile, so that a token attends
// alike here and there.

// A token's KV heads whose query heads share a tile.
struct Share {
    int64_t sequence, kv_head, kv_heads;
};

// Where the runs of a share's tile begin, in elements from a head's first.
struct SharedTile {
    const KvView &kv;
    const int32_t *table;
    int64_t kv_head, kv_heads, first, cached;  // the tile's first token, and how many there are from it
    int64_t at[kTileRuns];

    SharedTile(const AttentionArgs &args, const Share &share, int64_t tile)
        : kv(args.kv), table(args.block_tables + share.sequence * args.table_stride), kv_head(share.kv_head),
          kv_heads(share.kv_heads), first(tile), cached(smaller_of(kTileTokens, args.context_lens[share.sequence] - tile)) {
        for (int64_t run = 0; run < runs(); run++) at[run] = place(run * kRunTokens);
    }

    int64_t runs() const { return ceil_div(cached, kRunTokens); }

    int64_t place(int64_t token) const {
        int64_t position = first + token, block = position / kv.block_tokens;
        return table[block] * kv.block_stride + (position - block * kv.block_tokens) * kv.token_stride;
    }

    const bf16 *head(const char *pool, int64_t index) const {
        return reinterpret_cast<const bf16 *>(pool) + (kv_head + index) * kv.head_stride;
    }
};

// Sixteen tokens' keys or values of a head.
struct Run {
    const bf16 *rows;
    int64_t stride;
};

// The runs of a share's tile, if there is one; keys first.
class RunByRun {
public:
    explicit RunByRun(const SharedTile *tile) : tile_(tile) {}

    int64_t lines() const {
        if (tile_ == nullptr) return 0;
        return 2 * tile_->kv_heads * tile_->cached * ceil_div(tile_->kv.head_dim * kElementBytes, kLineBytes);
    }

    bool open(const char *&line, const char *&end) {
        if (tile_ == nullptr || next_ == 2 * tile_->runs() * tile_->kv_heads) return false;
        int64_t run = next_ % tile_->runs(), head = next_ / tile_->runs() % tile_->kv_heads;
        bool keys = next_ < tile_->runs() * tile_->kv_heads;
        int64_t tokens = smaller_of(kRunTokens, tile_->cached - run * kRunTokens);
        const bf16 *first = tile_->head(keys ? tile_->kv.key : tile_->kv.value, head) + tile_->at[run];
        line = reinterpret_cast<const char *>(first), end = line + tokens * tile_->kv.head_dim * kElementBytes;
        next_++;
        return true;
    }

private:
    static constexpr int64_t kElementBytes = sizeof(bf16);

    const SharedTile *tile_;
    int64_t next_ = 0;
};

using TileFetching = Fetching<RunByRun>;

// What the parts of the work on a tile take, in cycles.
constexpr int64_t kScoreCycles = 80, kPeakCycles = 4, kWeightCycles = 20, kPackCycles = 12;

// Where `interleave_lanes` puts what: columns of `low`, then of `high`, by pieces of four.
inline void interleave_lanes(const bf16 *even, const bf16 *odd, bf16 *low, bf16 *high) {
    __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
    _mm512_store_si512(low, _mm512_unpacklo_epi16(a, b));
    _mm512_store_si512(high, _mm512_unpackhi_epi16(a, b));
}

// Turns the columns of 32 sums back into the order of the dimensions.
inline void straighten(float *sums) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    __m512 low = _mm512_loadu_ps(sums), high = _mm512_loadu_ps(sums + 16);
    _mm512_storeu_ps(sums, _mm512_permutex2var_ps(low, first, high));
    _mm512_storeu_ps(sums + 16, _mm512_permutex2var_ps(low, second, high));
}

// A share while its tiles pass.
struct Decoding {
    const Task<bf16> &task;
    Softmax softmax;
    bf16 *queries;  // [KV head][step] tiles of [pair of dimensions][row][2]
    bf16 *weights;  // [KV head][step of tokens] tiles of [row][token], zero in rows of other heads
    bf16 *copies;   // of runs that do not lie in the cache as the tiles want them
    bf16 *packed;   // values of two heads

    int64_t steps() const { return task.depth / kStep; }

    void turn_queries() const {
        int64_t group = group_of(task.args);
        for (int64_t head = 0; head < task.kv_heads; head++)
            for (int64_t step = 0; step < steps(); step++) {
                const uint32_t *words[16];
                for (int64_t row = 0; row < 16; row++) {
                    const bf16 *query = task.queries + row * task.depth + step * kStep;
                    const bf16 *here = row < task.rows && row / group == head ? query : reinterpret_cast<const bf16 *>(zero_row);
                    words[row] = reinterpret_cast<const uint32_t *>(here);
                }
                transpose16(words, reinterpret_cast<uint32_t *>(queries + (head * steps() + step) * kTile), 16);
            }
    }

    // What lies past the context is left out of a whole run.
    Run find(const SharedTile &tile, const char *pool, int64_t head, int64_t run) const {
        int64_t dim = tile.kv.head_dim, first = run * kRunTokens;
        const bf16 *from = tile.head(pool, head);
        bool whole = first + kRunTokens <= tile.cached && tile.kv.block_tokens % kRunTokens == 0 && dim == task.depth;
        if (whole) return {from + tile.at[run], tile.kv.token_stride};
        bf16 *copy = copies + run * kRunTokens * task.depth;
        std::memset(copy, 0, kRunTokens * task.depth * sizeof(bf16));
        for (int64_t i = 0; i < kRunTokens && first + i < tile.cached; i++)
            std::memcpy(copy + i * task.depth, from + tile.place(first + i), dim * sizeof(bf16));
        return {copy, task.depth};
    }

    // Four sums at a time keep the tiles busy. Scores of runs past the context are left as they are.
    void score(const SharedTile &tile, float *scores, TileFetching &fetching) const {
        clear_sums();
        for (int64_t head = 0; head < task.kv_heads; head++) {
            Run runs[kTileRuns];
            for (int64_t run = 0; run < kTileRuns; run++) runs[run] = run < tile.runs() ? find(tile, tile.kv.key, head, run) : runs[0];
            settle_memory();
            for (int64_t step = 0; step < steps(); step++) {
                fetching.pay(kScoreCycles);
                _tile_loadd(4, queries + (head * steps() + step) * kTile, 64);
                _tile_loadd(5, runs[0].rows + step * kStep, runs[0].stride * sizeof(bf16));
                _tile_dpbf16ps(0, 5, 4);
                if (tile.runs() == 1) continue;
                _tile_loadd(6, runs[1].rows + step * kStep, runs[1].stride * sizeof(bf16));
                _tile_dpbf16ps(1, 6, 4);
                if (tile.runs() == 2) continue;
                _tile_loadd(7, runs[2].rows + step * kStep, runs[2].stride * sizeof(bf16));
                _tile_dpbf16ps(2, 7, 4);
                _tile_loadd(5, runs[3].rows + step * kStep, runs[3].stride * sizeof(bf16));
                _tile_dpbf16ps(3, 5, 4);
            }
        }
        _tile_stored(0, scores, 64);
        _tile_stored(1, scores + 16 * kRunTokens, 64);
        _tile_stored(2, scores + 32 * kRunTokens, 64);
        _tile_stored(3, scores + 48 * kRunTokens, 64);
        settle_memory();
    }

    // `weigh` with a row a lane: the same sums in the same order, but nothing across lanes.
    void weigh_lanes(const SharedTile &tile, float *scores, TileFetching &fetching) const {
        int64_t begin = task.first_seen(0) - tile.first, end = tile.cached;
        begin = begin < 0 ? 0 : begin;
        Vec before = load(task.maxima), peak = before;
        for (int64_t token = 0; token < tile.runs() * kRunTokens; token++) {
            Vec score = token < begin || token >= end ? splat(-INFINITY) : logit(softmax, load(scores + token * 16));
            store(scores + token * 16, score);
            peak = larger(peak, score);
            fetching.pay(kPeakCycles);
        }
        alignas(64) uint32_t pairs[kTileTokens / 2 * 16] = {};
        Vec parts[16];
        for (Vec &part : parts) part = splat(0.f);
        for (int64_t run = 0; run < tile.runs(); run++)
            weigh_run(scores + run * 16 * kRunTokens, peak, parts, pairs + run * 128, [&] { fetching.pay(2 * kWeightCycles); });
        place_weights(pairs);
        Vec shrink = power_of_two(before - peak);
        store(task.maxima, peak);
        store(task.sums, fma(load(task.sums), shrink, sum_up(parts)));
        shrink_outputs(shrink);
    }

    void place_weights(const uint32_t *pairs) const {
        int64_t group = group_of(task.args);
        for (int64_t step = 0; step < kTileSteps; step++) {
            alignas(64) uint32_t turned[16 * 16];
            const uint32_t *words[16];
            for (int64_t i = 0; i < 16; i++) words[i] = pairs + (step * 16 + i) * 16;
            transpose16(words, turned, 16);
            for (int64_t row = 0; row < task.rows; row++) {
                bf16 *tile = weights + (row / group * kTileSteps + step) * kTile;
                std::memcpy(tile + row * kStep, turned + row * 16, kStep * sizeof(bf16));
            }
        }
    }

    void shrink_outputs(Vec shrink) const {
        alignas(64) float lanes[16];
        store(lanes, shrink);
        for (int64_t row = 0; row < task.rows; row++) {
            if (lanes[row] == 1) continue;
            float *line = task.outputs + row * task.depth;
            row_map(line, task.depth, [=](auto at) { return at(const_cast<const float *>(line)) * splat(lanes[row]); });
        }
    }

    // Panels as of pack_values, but for the order of columns.
    template <int tiles>
    void pack_head(const SharedTile &tile, int64_t head, int64_t column, bf16 *out, TileFetching &fetching) const {
        for (int64_t run = 0; run < round_up(tile.runs(), 2); run++) {
            Run values = find(tile, tile.kv.value, head, run);
            bf16 *pairs = out + run / 2 * tiles * kTile + run % 2 * kTile / 2;
            for (int64_t i = 0; i < kRunTokens; i += 2, pairs += 32) {
                const bf16 *even = values.rows + i * values.stride + column, *odd = even + values.stride;
                for (int t = 0; t < tiles; t += 2) interleave_lanes(even + t * 16, odd + t * 16, pairs + t * kTile, pairs + (t + 1) * kTile);
                fetching.pay(kPackCycles);
            }
        }
    }

    template <int tiles>
    void add_values(const SharedTile &tile, int64_t head, const bf16 *values) const {
        settle_memory();
        for (int64_t step = 0; step * kStep < tile.cached; step++, values += tiles * kTile) {
            _tile_loadd(4, weights + (head * kTileSteps + step) * kTile, 64);
            _tile_loadd(5, values, 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, values + kTile, 64);
            _tile_dpbf16ps(1, 4, 6);
            if (tiles == 2) continue;
            _tile_loadd(7, values + 2 * kTile, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, values + 3 * kTile, 64);
            _tile_dpbf16ps(3, 4, 5);
        }
    }

    // A head's values are packed while those packed before leave the core.
    template <int tiles>
    void add_columns(const SharedTile &tile, int64_t column, TileFetching &fetching) const {
        int64_t size = kTileTokens * kColumns;
        pack_head<tiles>(tile, 0, column, packed, fetching);
        load_columns<tiles>(column);
        for (int64_t head = 0; head < task.kv_heads; head++) {
            if (head + 1 < task.kv_heads) pack_head<tiles>(tile, head + 1, column, packed + (head + 1) % 2 * size, fetching);
            add_values<tiles>(tile, head, packed + head % 2 * size);
        }
        store_columns<tiles>(column);
    }

    template <int tiles>
    void load_columns(int64_t column) const {
        const float *out = task.outputs + column;
        int64_t bytes = task.depth * sizeof(float);
        settle_memory();
        _tile_loadd(0, out, bytes);
        _tile_loadd(1, out + 16, bytes);
        if (tiles == 2) return;
        _tile_loadd(2, out + 32, bytes);
        _tile_loadd(3, out + 48, bytes);
    }

    template <int tiles>
    void store_columns(int64_t column) const {
        float *out = task.outputs + column;
        int64_t bytes = task.depth * sizeof(float);
        _tile_stored(0, out, bytes);
        _tile_stored(1, out + 16, bytes);
        if (tiles == 4) {
            _tile_stored(2, out + 32, bytes);
            _tile_stored(3, out + 48, bytes);
        }
        settle_memory();
    }

    int64_t cycles() const {
        int64_t weighing = kTileTokens * (kPeakCycles + kWeightCycles);
        return weighing + task.kv_heads * (steps() * kScoreCycles + ceil_div(task.depth, kColumns) * kTileTokens / 2 * kPackCycles);
    }

    // `next` is brought in meanwhile, if there is one.
    void attend(const SharedTile &tile, const SharedTile *next) const {
        alignas(64) float scores[16 * kTileTokens];
        TileFetching fetching(RunByRun(next), cycles());
        score(tile, scores, fetching);
        weigh_lanes(tile, scores, fetching);
        int64_t column = 0;
        for (; column + kColumns <= task.depth; column += kColumns) add_columns<4>(tile, column, fetching);
        if (column < task.depth) add_columns<2>(tile, column, fetching);
        fetching.end();
    }

    void straighten_outputs() const {
        for (int64_t at = 0; at < task.rows * task.depth; at += kStep) straighten(task.outputs + at);
    }
};

inline int64_t first_tile_of(const AttentionArgs &args, const Share &share) {
    int64_t begin = args.window == 0 ? 0 : args.context_lens[share.sequence] - args.window;
    return begin < 0 ? 0 : begin / kTileTokens * kTileTokens;
}

// The tile that is met after one: of the same share, or of the next.
inline std::optional<SharedTile> next_tile(const AttentionArgs &args, const Share *share, const Share *end, int64_t tile) {
    if (tile + kTileTokens < args.context_lens[share->sequence]) return SharedTile(args, *share, tile + kTileTokens);
    if (share + 1 == end) return std::nullopt;
    return SharedTile(args, share[1], first_tile_of(args, share[1]));
}

void decode_shares(const AttentionArgs &args, const Share *share, const Share *end) {
    Tiles configured;
    int64_t depth = round_up(args.kv.head_dim, kStep), heads = args.kv.kv_heads;
    auto room = [&](ScratchSlot slot, int64_t elements) { return static_cast<bf16 *>(scratch(slot, elements * sizeof(bf16))); };
    auto outputs = static_cast<float *>(scratch(kOutput, 16 * depth * sizeof(float)));
    bf16 *rows = room(kQuery, 16 * depth), *turned = room(kInput, heads * 16 * depth);
    bf16 *weights = room(kWeights, heads * kTileSteps * kTile);
    bf16 *copies = room(kKeys, kTileTokens * depth), *packed = room(kValues, 2 * kTileTokens * kColumns);
    alignas(64) float maxima[16] = {}, sums[16] = {};
    int64_t positions[16];
    std::memset(weights, 0, heads * kTileSteps * kTile * sizeof(bf16));
    for (; share != end; share++) {
        Task<bf16> task{args, share->sequence, share->kv_head, share->kv_heads, 0, share->kv_heads * group_of(args),
                        depth, rows, outputs, maxima, sums, positions};
        Decoding decoding{task, softmax_of(args), turned, weights, copies, packed};
        start(task);
        decoding.turn_queries();
        for (int64_t tile = first_tile_of(args, *share); tile < task.context(); tile += kTileTokens) {
            std::optional<SharedTile> next = next_tile(args, share, end, tile);
            decoding.attend(SharedTile(args, *share, tile), next ? &*next : nullptr);
        }
        decoding.straighten_outputs();
        finish(task);
    }
}

// As many KV heads a share as a tile holds, fewer if threads would have none.
std::vector<Share> shares_of(const AttentionArgs &args, const std::vector<int64_t> &sequences) {
    int64_t count = static_cast<int64_t>(sequences.size()), all = args.kv.kv_heads;
    int64_t pieces = ceil_div(all, smaller_of(16 / group_of(args), all));
    while (count * pieces < threads() && pieces < all) pieces++;
    int64_t heads = ceil_div(all, pieces);
    std::vector<Share> shares;
    for (int64_t sequence : sequences)
        for (int64_t head = 0; head < all; head += heads) shares.push_back({sequence, head, smaller_of(heads, all - head)});
    return shares;
}

void attention_tiles(const AttentionArgs &args) {
    constexpr int64_t tasks_a_thread = 4;  // sequences differ in length
    auto decodes = [&](int64_t sequence) { return tokens_of(args, sequence) == 1 && group_of(args) <= 16; };
    attend_sequences<bf16>(args, attend_prompt, [&](int64_t sequence) { return !decodes(sequence); });
    std::vector<int64_t> decoding;
    for (int64_t s = 0; s < args.sequences; s++)
        if (decodes(s)) decoding.push_back(s);
    if (decoding.empty()) return;
    std::vector<Share> shares = shares_of(args, decoding);
    int64_t count = static_cast<int64_t>(shares.size());
    int64_t grain = threads() == 1 ? count : ceil_div(count, threads() * tasks_a_thread);
    parallel_ranges(count, grain, [&](int64_t begin, int64_t end) { decode_shares(args, shares.data() + begin, shares.data() + end); });
}
