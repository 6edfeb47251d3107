// Chunks of prompts in AMX tiles, sixteen rows of queries at a time. Scores come out turned, a row
// a lane, so that nothing of the softmax goes across lanes: keys are A as they lie in the cache,
// queries are B. Weights are B as they come, values are A, and the outputs gather turned, too.

struct Prompting {
    const Task<bf16> &task;
    Softmax softmax;
    bf16 *queries;   // [group of rows][step] tiles of [pair of dimensions][row][2]
    bf16 *keys;      // [token, depth]
    bf16 *panels;    // of pack_values
    bf16 *values;    // [16 dimensions][step of tokens] tiles of [dimension][token]
    float *outputs;  // [group of rows][dimension][row]
    float *scores;   // [two of the groups][token][row]
    uint32_t *pairs;  // [two of the groups][pair of tokens][row] weights

    int64_t groups() const { return ceil_div(task.rows, kTileRows); }
    int64_t steps() const { return task.depth / kStep; }

    void begin() const {
        for (int64_t row = task.rows; row < groups() * kTileRows; row++) {
            task.positions[row] = task.positions[task.rows - 1];
            task.maxima[row] = kNothingSeen, task.sums[row] = 0;
        }
        for (int64_t group = 0; group < groups(); group++)
            for (int64_t step = 0; step < steps(); step++) turn_queries(group, step);
        std::memset(outputs, 0, groups() * kTileRows * task.depth * sizeof(float));
    }

    void turn_queries(int64_t group, int64_t step) const {
        const uint32_t *words[kTileRows];
        for (int64_t i = 0; i < kTileRows; i++) {
            int64_t row = group * kTileRows + i;
            const void *from = row < task.rows ? static_cast<const void *>(task.queries + row * task.depth + step * kStep) : zero_row;
            words[i] = static_cast<const uint32_t *>(from);
        }
        transpose16(words, reinterpret_cast<uint32_t *>(queries + (group * steps() + step) * kTile), 16);
    }

    void pack(const TileRows<bf16> &rows) const {
        int64_t dim = task.args.kv.head_dim;
        for (int64_t token = 0; token < kTileTokens; token++) {
            std::memcpy(keys + token * task.depth, rows.keys[token], dim * sizeof(bf16));
            std::memset(keys + token * task.depth + dim, 0, (task.depth - dim) * sizeof(bf16));
        }
        pack_values(rows.values, dim, task.depth, panels);
        for (int64_t column = 0; column < task.depth; column += 16)
            for (int64_t step = 0; step < kTileSteps; step++) {
                const bf16 *tile = panels + column / kPanel * kPanel * kTileTokens + (2 * step + column % kPanel / 16) * kTile;
                const uint32_t *words[16];
                for (int64_t i = 0; i < 16; i++) words[i] = reinterpret_cast<const uint32_t *>(tile + i * 32);
                transpose16(words, reinterpret_cast<uint32_t *>(values + (column / 16 * kTileSteps + step) * kTile), 16);
            }
    }

    // Scores of the group after are there before those of this one are weighed: what tiles store
    // has left the core when it is loaded.
    void attend(int64_t tile) const {
        int64_t group = 0;  // those before it see nothing of this tile
        while (task.positions[group * kTileRows + kTileRows - 1] < tile) group++;
        score(group);
        for (int64_t first = group; group < groups(); group++) {
            if (group + 1 < groups()) score(group + 1);
            weigh(group, tile);
            if (group > first) add_values(group - 1);
        }
        add_values(group - 1);
    }

    void add_values(int64_t group) const {
        for (int64_t column = 0; column < task.depth; column += kColumns)
            column + kColumns <= task.depth ? add_columns<4>(group, column) : add_columns<2>(group, column);
    }

    float *scores_of(int64_t group) const { return scores + group % 2 * kTileTokens * kTileRows; }
    uint32_t *pairs_of(int64_t group) const { return pairs + group % 2 * kTileTokens / 2 * kTileRows; }

    void score(int64_t group) const {
        const bf16 *turned = queries + group * steps() * kTile;
        int64_t bytes = task.depth * sizeof(bf16), run = kTileRows * task.depth;
        float *out = scores_of(group);
        settle_memory();
        clear_sums();
        for (int64_t step = 0; step < steps(); step++) {
            const bf16 *from = keys + step * kStep;
            _tile_loadd(4, turned + step * kTile, 64);
            _tile_loadd(5, from, bytes);
            _tile_dpbf16ps(0, 5, 4);
            _tile_loadd(6, from + run, bytes);
            _tile_dpbf16ps(1, 6, 4);
            _tile_loadd(7, from + 2 * run, bytes);
            _tile_dpbf16ps(2, 7, 4);
            _tile_loadd(5, from + 3 * run, bytes);
            _tile_dpbf16ps(3, 5, 4);
        }
        _tile_stored(0, out, 64);
        _tile_stored(1, out + 16 * kTileRows, 64);
        _tile_stored(2, out + 32 * kTileRows, 64);
        _tile_stored(3, out + 48 * kTileRows, 64);
        settle_memory();
    }

    void weigh(int64_t group, int64_t tile) const {
        float *here = scores_of(group), *maxima = task.maxima + group * kTileRows, *sums = task.sums + group * kTileRows;
        Vec before = load(maxima), peak = sees_all(group, tile) ? find_logits(here, before) : find_seen_logits(group, tile, here, before);
        Vec parts[16];
#pragma GCC unroll 16
        for (Vec &part : parts) part = splat(0.f);
#pragma GCC unroll 4
        for (int64_t run = 0; run < kTileRuns; run++) weigh_run(here + run * 16 * kRunTokens, peak, parts, pairs_of(group) + run * 128, [] {});
        Vec shrink = power_of_two(before - peak);
        store(maxima, peak);
        store(sums, fma(load(sums), shrink, sum_up(parts)));
        if (_mm512_cmp_ps_mask(shrink.v, splat(1.f).v, _CMP_NEQ_UQ) == 0) return;
        float *line = outputs + group * kTileRows * task.depth;
        for (int64_t i = 0; i < task.depth; i++, line += kTileRows) store(line, load(line) * shrink);
    }

    bool sees_all(int64_t group, int64_t tile) const {
        int64_t first = group * kTileRows, last = first + kTileRows - 1;
        return task.positions[first] + 1 >= tile + kTileTokens && task.first_seen(last) <= tile;
    }

    // The highest so far.
    Vec find_logits(float *here, Vec peak) const {
        if (softmax.soft_cap != 0) return each_logit(here, peak, [this](Vec score) { return logit(softmax, score); });
        Vec scale = splat(softmax.scale);
        return each_logit(here, peak, [scale](Vec score) { return score * scale; });
    }

    template <class Logit>
    static Vec each_logit(float *here, Vec peak, Logit logit_of) {
        Vec peaks[4] = {peak, peak, peak, peak};
#pragma GCC unroll 16
        for (int64_t token = 0; token < kTileTokens; token++) {
            Vec score = logit_of(load(here + token * kTileRows));
            store(here + token * kTileRows, score);
            peaks[token % 4] = larger(peaks[token % 4], score);
        }
        return larger(larger(peaks[0], peaks[1]), larger(peaks[2], peaks[3]));
    }

    Vec find_seen_logits(int64_t group, int64_t tile, float *here, Vec peak) const {
        alignas(64) int32_t begins[kTileRows], ends[kTileRows];
        for (int64_t i = 0; i < kTileRows; i++) {
            int64_t row = group * kTileRows + i;
            begins[i] = static_cast<int32_t>(task.first_seen(row) - tile), ends[i] = static_cast<int32_t>(task.positions[row] + 1 - tile);
        }
        __m512i from = _mm512_load_si512(begins), to = _mm512_load_si512(ends);
        for (int64_t token = 0; token < kTileTokens; token++) {
            __m512i at = _mm512_set1_epi32(static_cast<int>(token));
            __mmask16 seen = _mm512_cmple_epi32_mask(from, at) & _mm512_cmpgt_epi32_mask(to, at);
            Vec score = logit(softmax, load(here + token * kTileRows));
            score.v = _mm512_mask_mov_ps(splat(-INFINITY).v, seen, score.v);
            store(here + token * kTileRows, score);
            peak = larger(peak, score);
        }
        return peak;
    }

    template <int tiles>
    void add_columns(int64_t group, int64_t column) const {
        const uint32_t *weights = pairs_of(group);
        float *out = outputs + (group * task.depth + column) * kTileRows;
        const bf16 *from = values + column / 16 * kTileSteps * kTile;
        settle_memory();
        _tile_loadd(0, out, 64);
        _tile_loadd(1, out + 256, 64);
        if (tiles == 4) {
            _tile_loadd(2, out + 512, 64);
            _tile_loadd(3, out + 768, 64);
        }
        for (int64_t step = 0; step < kTileSteps; step++, from += kTile) {
            _tile_loadd(4, weights + step * 256, 64);
            _tile_loadd(5, from, 64);
            _tile_dpbf16ps(0, 5, 4);
            _tile_loadd(6, from + kTileSteps * kTile, 64);
            _tile_dpbf16ps(1, 6, 4);
            if (tiles == 2) continue;
            _tile_loadd(7, from + 2 * kTileSteps * kTile, 64);
            _tile_dpbf16ps(2, 7, 4);
            _tile_loadd(5, from + 3 * kTileSteps * kTile, 64);
            _tile_dpbf16ps(3, 5, 4);
        }
        _tile_stored(0, out, 64);
        _tile_stored(1, out + 256, 64);
        if (tiles == 4) {
            _tile_stored(2, out + 512, 64);
            _tile_stored(3, out + 768, 64);
        }
        settle_memory();
    }

    void end() const {
        for (int64_t group = 0; group < groups(); group++)
            for (int64_t column = 0; column < task.depth; column += 16) {
                const uint32_t *words[16];
                const float *from = outputs + (group * task.depth + column) * kTileRows;
                for (int64_t i = 0; i < 16; i++) words[i] = reinterpret_cast<const uint32_t *>(from + i * kTileRows);
                float *to = task.outputs + group * kTileRows * task.depth + column;
                transpose16(words, reinterpret_cast<uint32_t *>(to), task.depth);
            }
    }
};

void attend_prompt(const Task<bf16> &task) {
    Tiles configured;
    int64_t depth = task.depth, rows = round_up(task.rows, kTileRows);
    auto room = [](ScratchSlot slot, int64_t elements, int64_t bytes) { return scratch(slot, elements * bytes); };
    auto packed = static_cast<bf16 *>(room(kValues, 2 * kTileTokens * depth, sizeof(bf16)));
    Prompting prompting{task,
                        softmax_of(task.args),
                        static_cast<bf16 *>(room(kInput, rows * depth, sizeof(bf16))),
                        static_cast<bf16 *>(room(kKeys, kTileTokens * depth, sizeof(bf16))),
                        packed,
                        packed + kTileTokens * depth,
                        static_cast<float *>(room(kSums, rows * depth, sizeof(float))),
                        static_cast<float *>(room(kScores, 2 * kTileTokens * kTileRows, sizeof(float))),
                        static_cast<uint32_t *>(room(kWeights, kTileTokens * kTileRows, sizeof(uint32_t)))};
    start(task);
    prompting.begin();
    each_packed_tile(task, [&](int64_t tile, const TileRows<bf16> &rows) {
        prompting.pack(rows);
        prompting.attend(tile);
    });
    prompting.end();
    finish(task);
}
