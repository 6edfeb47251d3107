// Linear layers on AMX tiles.

inline int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

// x in tiles: [rows / 16][steps][16][32]. Rows past the last are whatever was there before.
struct TiledInput {
    bf16 *tiles;
    int64_t steps, row_tiles;

    explicit TiledInput(const LinearArgs &args)
        : steps(ceil_div(args.in_features, kStep)), row_tiles(ceil_div(args.rows, kTileRows)) {
        tiles = static_cast<bf16 *>(scratch(kInput, row_tiles * steps * kTile * sizeof(bf16)));
        int64_t grain = round_up(rows_a_task(args.in_features), kTileRows);
        parallel_ranges(args.rows, grain, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; row++) cut(args, row);
        });
    }

    void cut(const LinearArgs &args, int64_t row) const {
        const bf16 *x = static_cast<const bf16 *>(args.x) + row * args.x_stride;
        bf16 *out = tiles + row / kTileRows * steps * kTile + row % kTileRows * kStep;
        int64_t whole = args.in_features / kStep, rest = args.in_features % kStep;
        for (int64_t step = 0; step < whole; step++)
            std::memcpy(out + step * kTile, x + step * kStep, kStep * sizeof(bf16));
        if (rest == 0) return;
        std::memset(out + whole * kTile, 0, kStep * sizeof(bf16));
        std::memcpy(out + whole * kTile, x + whole * kStep, rest * sizeof(bf16));
    }

    const bf16 *at(int64_t row_tile, int64_t step) const { return tiles + (row_tile * steps + step) * kTile; }
};

constexpr int64_t kDepthSteps = 12;               // of a panel, 24 KB, stay in L1 while rows pass
constexpr int64_t kInputBlockBytes = 1280 << 10;  // of x stay in L2 while panels pass
constexpr int64_t kStepLines = 32;                // cache lines of a panel in one step

// Between two tasks the stream pauses; without threads to share them there need not be as many.
constexpr int64_t kLoneTaskWeightBytes = 512 << 10;

constexpr int64_t kStreamedTiles = 4;             // of rows at most, past which weights go by
constexpr int64_t kSlabTiles = 32;                // of x stay in L1 while slabs of weights stream by

constexpr int64_t kPassPanels = 4;  // written out together: a row's lines lie in one page

// A run of row tiles that meets panels; `sums` is [kPassPanels][rows, 32].
struct RowBlock {
    const LinearArgs &args;
    const TiledInput &x;
    int64_t first, tiles;
    float *sums;

    const bf16 *panel(int64_t index) const {
        return static_cast<const bf16 *>(args.weight) + index * x.steps * 2 * kTile;
    }

    float *sums_of(int64_t panel) const { return sums + panel * round_up(tiles, 2) * kTileRows * kPanel; }

    TileBlock block(const bf16 *panel, float *sums, int64_t tile, int64_t step, int64_t steps) const {
        return {x.at(first + tile, step), kStep, kTile, x.steps * kTile, panel + step * 2 * kTile, steps,
                sums + tile * kTileRows * kPanel, kPanel, step > 0, nullptr, 0};
    }

    // Few rows: panels stream by, a slab of each at a time, so that the part of x that meets the
    // slabs stays in L1.
    void stream_group(int64_t begin, int64_t end) const {
        int64_t slabs = tiles <= 2 ? 1 : ceil_div(x.steps * tiles, kSlabTiles), slab = ceil_div(x.steps, slabs);
        for (int64_t step = 0; step < x.steps; step += slab) {
            const bf16 *after = step + slab < x.steps ? panel(begin) + (step + slab) * 2 * kTile : panel(end);
            for (int64_t index = begin; index < end; index++) {
                const bf16 *next = index + 1 < end ? panel(index + 1) + step * 2 * kTile : after;
                stream_slab(index, sums_of(index - begin), step, smaller_of(slab, x.steps - step), next);
            }
        }
        emit_group(begin, end);
    }

    void stream_slab(int64_t index, float *panel_sums, int64_t step, int64_t steps, const bf16 *next) const {
        TileBlock slab = block(panel(index), panel_sums, 0, step, steps);
        slab.next = next;
        if (tiles <= 2) return multiply_rows<kReuseRows>(slab, tiles);
        for (int64_t half = 0; half < 2; half++) {
            TileBlock part = slab;
            part.panel += half * kTile, part.c += half * 16;
            part.next = half == 0 ? slab.panel + kTile : next, part.far = next + half * steps * kTile;
            tiles == 3 ? multiply_tall<3>(part) : multiply_tall<4>(part);
        }
    }

    // Many rows: a slab of the panel stays in L1 while they pass, and the next slab is fetched.
    void pass(const bf16 *panel, float *panel_sums) const {
        int64_t lines = ceil_div(kStepLines, ceil_div(tiles, 2));
        for (int64_t step = 0; step < x.steps; step += kDepthSteps) {
            int64_t steps = smaller_of(kDepthSteps, x.steps - step);
            for (int64_t tile = 0; tile < tiles; tile += 2) {
                TileBlock part = block(panel, panel_sums, tile, step, steps);
                part.next = part.panel + steps * (2 * kTile + tile / 2 * lines * kLine);
                part.next_lines = lines;
                multiply_rows<kReusePanel>(part, tiles - tile);
            }
        }
    }

    void pass_group(int64_t begin, int64_t end) const {
        for (int64_t index = begin; index < end; index++) pass(panel(index), sums_of(index - begin));
        emit_group(begin, end);
    }

    void emit_group(int64_t begin, int64_t end) const {
        int64_t row = first * kTileRows, rows = smaller_of(tiles * kTileRows, args.rows - row);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t index = begin; index < end; index++)
                emit<bf16>(args, sums_of(index - begin) + i * kPanel, row + i, 1, index * kPanel);
    }
};

// At most kStreamedTiles of rows.
void linear_streaming(const LinearArgs &args, const TiledInput &x) {
    int64_t panels = ceil_div(args.out_features, kPanel);
    int64_t task_bytes = threads() == 1 && x.row_tiles <= 2 ? kLoneTaskWeightBytes : kTaskWeightBytes;
    int64_t grain = ceil_div(task_bytes, x.steps * 2 * kTile * static_cast<int64_t>(sizeof(bf16)));
    if (x.row_tiles > 2 && grain < kPassPanels) grain = kPassPanels;
    parallel_ranges(panels, grain, [&](int64_t begin, int64_t end) {
        Tiles configured(x.row_tiles > 2 ? 2 * kTileRows : args.rows);
        int64_t room = (end - begin) * round_up(x.row_tiles, 2) * kTileRows * kPanel;
        RowBlock rows{args, x, 0, x.row_tiles, static_cast<float *>(scratch(kSums, room * sizeof(float)))};
        rows.stream_group(begin, end);
    });
}

void linear_passing(const LinearArgs &args, const TiledInput &x) {
    int64_t most = kInputBlockBytes / (x.steps * kTile * static_cast<int64_t>(sizeof(bf16))) / 2 * 2;
    int64_t block_tiles = smaller_of(most < 2 ? 2 : most, x.row_tiles);
    int64_t blocks = ceil_div(x.row_tiles, block_tiles), panels = ceil_div(args.out_features, kPanel);
    int64_t groups = ceil_div(panels, kPassPanels);
    parallel(blocks * groups, [&](int64_t task) {
        Tiles configured;
        int64_t first = task / groups * block_tiles, tiles = smaller_of(block_tiles, x.row_tiles - first);
        int64_t room = kPassPanels * round_up(tiles, 2) * kTileRows * kPanel;
        RowBlock rows{args, x, first, tiles, static_cast<float *>(scratch(kSums, room * sizeof(float)))};
        int64_t begin = task % groups * kPassPanels;
        rows.pass_group(begin, smaller_of(begin + kPassPanels, panels));
    });
}

void linear_tiles(const LinearArgs &args) {
    TiledInput x(args);
    x.row_tiles <= kStreamedTiles ? linear_streaming(args, x) : linear_passing(args, x);
}
