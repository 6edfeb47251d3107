// One token of a sequence against several KV heads at once, in AMX tiles. Keys are met as they lie
// in the cache, as rows of A. The queries are B: a head's stand in columns of their own, zero in
// those of the others, so that the scores of all heads fill one tile. Sums run in the order of
// attend_tile, so that a token attends alike here and there.

constexpr int64_t kRunTokens = 16;  // of a block, met together
constexpr int64_t kTileRuns = kTileTokens / kRunTokens;
constexpr int64_t kFetchedElements = 32;  // of a run, a cache line of them

// A token's KV heads whose query heads share a tile.
struct Share {
    int64_t sequence, kv_head, kv_heads;
};

// Registers 0 and 1 hold scores, 2 and 7 keys or values, 3 queries or values; 4 and 5 the outputs
// of one group of heads, 6 its weights.
struct DecodeTiles {
    explicit DecodeTiles(int64_t group) {
        TileConfig config;
        config.rows[4] = config.rows[5] = config.rows[6] = static_cast<uint8_t>(group);
        __asm__ volatile("" ::"r"(&config) : "memory");
        _tile_loadconfig(&config);
    }
    DecodeTiles(const DecodeTiles &) = delete;
    ~DecodeTiles() { _tile_release(); }
};

// Where the runs of a share's tile begin, in elements from a head's first.
struct SharedTile {
    const KvView &kv;
    const int32_t *table;
    int64_t kv_head, first, cached;  // the tile's first token, and how many there are from it
    int64_t at[kTileRuns];

    SharedTile(const AttentionArgs &args, const Share &share, int64_t tile)
        : kv(args.kv), table(args.block_tables + share.sequence * args.table_stride), kv_head(share.kv_head), first(tile),
          cached(smaller_of(kTileTokens, args.context_lens[share.sequence] - tile)) {
        for (int64_t run = 0; run < kTileRuns; run++) at[run] = place(smaller_of(run * kRunTokens, cached - 1));
    }

    int64_t place(int64_t token) const {
        int64_t position = first + token, block = position / kv.block_tokens;
        return table[block] * kv.block_stride + (position - block * kv.block_tokens) * kv.token_stride;
    }

    const bf16 *head(const char *pool, int64_t index) const {
        return reinterpret_cast<const bf16 *>(pool) + (kv_head + index) * kv.head_stride;
    }

    void fetch(const char *pool, int64_t index, int64_t run) const {
        const bf16 *begin = head(pool, index) + at[run], *end = begin + kRunTokens * kv.head_dim;
        for (; begin < end; begin += kFetchedElements) __builtin_prefetch(begin, 0, kIntoL2);
    }
};

// Sixteen tokens' keys or values of a head.
struct Run {
    const bf16 *rows;
    int64_t stride;
};

// A share while its tiles pass.
struct Decoding {
    const Task<bf16> &task;
    Softmax softmax;
    bf16 *queries;  // [KV head][step] tiles of [pair of dimensions][row][2]
    bf16 *copies;   // of two runs that do not lie in the cache as the tiles want them
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
        bf16 *copy = copies + run % 2 * kRunTokens * task.depth;
        std::memset(copy, 0, kRunTokens * task.depth * sizeof(bf16));
        for (int64_t i = 0; i < kRunTokens && first + i < tile.cached; i++)
            std::memcpy(copy + i * task.depth, from + tile.place(first + i), dim * sizeof(bf16));
        return {copy, task.depth};
    }

    // The scores of two runs, [token][row]; meanwhile the keys of the next tile are fetched.
    void score(const SharedTile &tile, const SharedTile &next, int64_t run, float *scores) const {
        const char *pool = tile.kv.key;
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t head = 0; head < task.kv_heads; head++) {
            Run first = find(tile, pool, head, run), second = find(tile, pool, head, run + 1);
            settle_memory();
            for (int64_t step = 0; step < steps(); step++) {
                _tile_loadd(3, queries + (head * steps() + step) * kTile, 64);
                _tile_loadd(2, first.rows + step * kStep, first.stride * sizeof(bf16));
                _tile_dpbf16ps(0, 2, 3);
                _tile_loadd(7, second.rows + step * kStep, second.stride * sizeof(bf16));
                _tile_dpbf16ps(1, 7, 3);
            }
            next.fetch(pool, head, run);
            next.fetch(pool, head, run + 1);
        }
        _tile_stored(0, scores, 64);
        _tile_stored(1, scores + 16 * kRunTokens, 64);
        settle_memory();
    }

    void score_tile(const SharedTile &tile, const SharedTile &next, float *scores) const {
        alignas(64) float turned[kTileTokens * 16];
        for (int64_t run = 0; run < kTileRuns; run += 2) score(tile, next, run, turned + run * kRunTokens * 16);
        for (int64_t token = 0; token < kTileTokens; token += 16) {
            const uint32_t *words[16];
            for (int64_t i = 0; i < 16; i++) words[i] = reinterpret_cast<const uint32_t *>(turned + (token + i) * 16);
            transpose16(words, reinterpret_cast<uint32_t *>(scores + token), kTileTokens);
        }
    }

    // Panels as of pack_values; meanwhile the values of the next tile are fetched.
    void pack_head(const SharedTile &tile, const SharedTile &next, int64_t head, bf16 *out) const {
        for (int64_t run = 0; run < kTileRuns; run++) {
            Run values = find(tile, tile.kv.value, head, run);
            next.fetch(tile.kv.value, head, run);
            bf16 *pairs = out + run / 2 * 2 * kTile + run % 2 * kTile / 2;
            for (int64_t i = 0; i < kRunTokens; i += 2, pairs += 32)
                for (int64_t d = 0; d < task.depth; d += kPanel) {
                    const bf16 *even = values.rows + i * values.stride + d;
                    interleave(even, even + values.stride, pairs + d * kTileTokens, pairs + d * kTileTokens + kTile);
                }
        }
    }

    void add_values(int64_t head, const bf16 *weights, const bf16 *values) const {
        int64_t row = head * group_of(task.args), bytes = task.depth * sizeof(float);
        weights += row * kTileTokens;
        settle_memory();
        for (int64_t d = 0; d < task.depth; d += kPanel) {
            float *out = task.outputs + row * task.depth + d;
            _tile_loadd(4, out, bytes);
            _tile_loadd(5, out + 16, bytes);
            for (int64_t token = 0; token < kTileTokens; token += kStep, values += 2 * kTile) {
                _tile_loadd(6, weights + token, kTileTokens * sizeof(bf16));
                _tile_loadd(3, values, 64);
                _tile_dpbf16ps(4, 6, 3);
                _tile_loadd(7, values + kTile, 64);
                _tile_dpbf16ps(5, 6, 7);
            }
            _tile_stored(4, out, bytes);
            _tile_stored(5, out + 16, bytes);
        }
        settle_memory();
    }

    // A head's values are packed while those packed before leave the core.
    void add_tile(const SharedTile &tile, const SharedTile &next, const bf16 *weights) const {
        int64_t size = kTileTokens * task.depth;
        pack_head(tile, next, 0, packed);
        for (int64_t head = 0; head < task.kv_heads; head++) {
            if (head + 1 < task.kv_heads) pack_head(tile, next, head + 1, packed + (head + 1) % 2 * size);
            add_values(head, weights, packed + head % 2 * size);
        }
    }

    void attend(const SharedTile &tile, const SharedTile &next) const {
        alignas(64) float scores[16 * kTileTokens];
        alignas(64) bf16 weights[16 * kTileTokens];
        score_tile(tile, next, scores);
        weigh_rows(task, softmax, tile.first, 0, scores, weights);
        add_tile(tile, next, weights);
    }
};

inline int64_t first_tile_of(const AttentionArgs &args, const Share &share) {
    int64_t begin = args.window == 0 ? 0 : args.context_lens[share.sequence] - args.window;
    return begin < 0 ? 0 : begin / kTileTokens * kTileTokens;
}

// The tile that is met after one: of the same share, of the next, or none but the same again.
inline SharedTile next_tile(const AttentionArgs &args, const Share *share, const Share *end, int64_t tile) {
    if (tile + kTileTokens < args.context_lens[share->sequence]) return {args, *share, tile + kTileTokens};
    if (share + 1 == end) return {args, *share, tile};
    return {args, share[1], first_tile_of(args, share[1])};
}

void decode_shares(const AttentionArgs &args, const Share *share, const Share *end) {
    DecodeTiles configured(group_of(args));
    int64_t depth = round_up(args.kv.head_dim, kStep);
    auto room = [&](ScratchSlot slot, int64_t elements) { return static_cast<bf16 *>(scratch(slot, elements * sizeof(bf16))); };
    auto outputs = static_cast<float *>(scratch(kOutput, 16 * depth * sizeof(float)));
    bf16 *rows = room(kQuery, 16 * depth), *turned = room(kInput, args.kv.kv_heads * 16 * depth);
    bf16 *copies = room(kKeys, 2 * kRunTokens * depth), *packed = room(kValues, 2 * kTileTokens * depth);
    float maxima[16], sums[16];
    int64_t positions[16];
    for (; share != end; share++) {
        Task<bf16> task{args, share->sequence, share->kv_head, share->kv_heads, 0, share->kv_heads * group_of(args),
                        depth, rows, outputs, maxima, sums, positions};
        Decoding decoding{task, softmax_of(args), turned, copies, packed};
        start(task);
        decoding.turn_queries();
        for (int64_t tile = first_tile_of(args, *share); tile < task.context(); tile += kTileTokens)
            decoding.attend(SharedTile(args, *share, tile), next_tile(args, share, end, tile));
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
    attend_sequences<Tiles, bf16>(args, [&](int64_t sequence) { return !decodes(sequence); });
    std::vector<int64_t> decoding;
    for (int64_t s = 0; s < args.sequences; s++)
        if (decodes(s)) decoding.push_back(s);
    if (decoding.empty()) return;
    std::vector<Share> shares = shares_of(args, decoding);
    int64_t count = static_cast<int64_t>(shares.size());
    int64_t grain = threads() == 1 ? count : ceil_div(count, threads() * tasks_a_thread);
    parallel_ranges(count, grain, [&](int64_t begin, int64_t end) { decode_shares(args, shares.data() + begin, shares.data() + end); });
}
