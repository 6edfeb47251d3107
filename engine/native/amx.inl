// Products in AMX tiles: registers 0 .. 3 hold sums, 4 and 5 rows of A, 6 and 7 a panel's halves.
// A row's sums do not depend on the other rows of its tile.

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr TileConfig kTileConfig;
constexpr int64_t kTileRows = 16;
constexpr int64_t kStreamAheadBytes = 8192;

// One or two tiles of rows, `a` bytes-strided, by one panel of `steps` steps.
struct TileBlock {
    const bf16 *a;
    int64_t row_stride, step_stride, tile_stride;  // of A, in elements
    const bf16 *panel;
    int64_t steps;
    float *c;
    int64_t ldc;
    bool accumulate;
};

// The tile intrinsics do not tell the compiler which memory they read.
inline void settle_memory() { __asm__ volatile("" ::: "memory"); }

template <bool two_tiles>
inline void load_sums(const TileBlock &block) {
    const float *c = block.c, *lower = block.c + kTileRows * block.ldc;
    int64_t bytes = block.ldc * sizeof(float);
    _tile_loadd(0, c, bytes);
    _tile_loadd(1, c + 16, bytes);
    if (!two_tiles) return;
    _tile_loadd(2, lower, bytes);
    _tile_loadd(3, lower + 16, bytes);
}

inline void clear_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

template <bool two_tiles>
inline void store_sums(const TileBlock &block) {
    float *c = block.c, *lower = block.c + kTileRows * block.ldc;
    int64_t bytes = block.ldc * sizeof(float);
    _tile_stored(0, c, bytes);
    _tile_stored(1, c + 16, bytes);
    if (two_tiles) {
        _tile_stored(2, lower, bytes);
        _tile_stored(3, lower + 16, bytes);
    }
    settle_memory();
}

inline void prefetch_step(const bf16 *panel) {
    for (int64_t line = 0; line < 2 * kTile; line += 32)
        __builtin_prefetch(reinterpret_cast<const char *>(panel + line) + kStreamAheadBytes);
}

template <bool two_tiles, bool streaming>
inline void multiply_block(const TileBlock &block) {
    settle_memory();
    block.accumulate ? load_sums<two_tiles>(block) : clear_sums();
    const bf16 *a = block.a, *panel = block.panel;
    int64_t a_bytes = block.row_stride * sizeof(bf16);
    for (int64_t step = 0; step < block.steps; step++, a += block.step_stride, panel += 2 * kTile) {
        if (streaming) prefetch_step(panel);
        _tile_loadd(6, panel, 64);
        _tile_loadd(7, panel + kTile, 64);
        _tile_loadd(4, a, a_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (!two_tiles) continue;
        _tile_loadd(5, a + block.tile_stride, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    store_sums<two_tiles>(block);
}

// Holds the tile configuration of the calling thread while it lives.
struct Tiles {
    Tiles() { _tile_loadconfig(&kTileConfig); }
    ~Tiles() { _tile_release(); }

    // Reads and writes whole tiles of rows; A and C have room for them.
    static void multiply(const bf16 *a, int64_t lda, int64_t rows, const bf16 *packed, int64_t depth, int64_t columns,
                         float *c, int64_t ldc, bool accumulate) {
        for (int64_t n = 0; n < columns; n += kPanel, packed += depth * kPanel)
            for (int64_t row = 0; row < rows; row += 2 * kTileRows) {
                TileBlock block{a + row * lda, lda, kStep, kTileRows * lda, packed, depth / kStep, c + row * ldc + n, ldc, accumulate};
                rows - row > kTileRows ? multiply_block<true, false>(block) : multiply_block<false, false>(block);
            }
    }
};

// --- linear layers ---------------------------------------------------------------------------

// x in tiles: [rows / 16][steps][16][32]. Rows past the last are whatever was there before.
struct TiledInput {
    bf16 *tiles;
    int64_t steps, row_tiles;

    explicit TiledInput(const LinearArgs &args)
        : steps(ceil_div(args.in_features, kStep)), row_tiles(ceil_div(args.rows, kTileRows)) {
        tiles = static_cast<bf16 *>(scratch(kInput, row_tiles * steps * kTile * sizeof(bf16)));
        parallel_ranges(args.rows, round_up(rows_a_task(args.in_features), kTileRows), [&](int64_t begin, int64_t end) {
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

inline int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int64_t kDepthSteps = 8;              // of a panel, 16 KB, stay in L1 while rows pass
constexpr int64_t kInputBlockBytes = 1280 << 10;  // of x stay in L2 while panels pass

// All rows of a block by one panel: sums [rows, 32].
void multiply_panel_tiles(const TiledInput &x, int64_t row_tile, int64_t row_tiles, const bf16 *panel, float *sums) {
    bool streaming = row_tiles <= 2;
    int64_t depth = streaming ? x.steps : kDepthSteps;
    for (int64_t step = 0; step < x.steps; step += depth)
        for (int64_t tile = 0; tile < row_tiles; tile += 2) {
            TileBlock block{x.at(row_tile + tile, step), kStep, kTile, x.steps * kTile, panel + step * 2 * kTile,
                            smaller_of(depth, x.steps - step), sums + tile * kTileRows * kPanel, kPanel, step > 0};
            if (streaming)
                row_tiles == 2 ? multiply_block<true, true>(block) : multiply_block<false, true>(block);
            else
                row_tiles - tile >= 2 ? multiply_block<true, false>(block) : multiply_block<false, false>(block);
        }
}

void linear_tiles(const LinearArgs &args) {
    TiledInput x(args);
    int64_t block_tiles = kInputBlockBytes / (x.steps * kTile * static_cast<int64_t>(sizeof(bf16))) / 2 * 2;
    block_tiles = smaller_of(block_tiles < 2 ? 2 : block_tiles, x.row_tiles);
    int64_t blocks = ceil_div(x.row_tiles, block_tiles), panels = ceil_div(args.out_features, kPanel);
    int64_t panel_size = x.steps * 2 * kTile, grain = ceil_div(kTaskWeightBytes, panel_size * static_cast<int64_t>(sizeof(bf16)));
    int64_t groups = ceil_div(panels, grain);
    parallel(blocks * groups, [&](int64_t task) {
        Tiles tiles;
        int64_t first_tile = task / groups * block_tiles, row_tiles = smaller_of(block_tiles, x.row_tiles - first_tile);
        float *sums = static_cast<float *>(scratch(kSums, row_tiles * kTileRows * kPanel * sizeof(float)));
        int64_t row = first_tile * kTileRows, rows = smaller_of(row_tiles * kTileRows, args.rows - row);
        int64_t begin = task % groups * grain, end = smaller_of(begin + grain, panels);
        for (int64_t panel = begin; panel < end; panel++) {
            multiply_panel_tiles(x, first_tile, row_tiles, static_cast<const bf16 *>(args.weight) + panel * panel_size, sums);
            emit<bf16>(args, sums, row, rows, panel * kPanel);
        }
    });
}

void linear_plain_tiles(const LinearArgs &args) { linear_plain<bf16>(args); }
