// Products in AMX tiles: registers 0 .. 3 hold sums, 4 and 5 rows of A, 6 and 7 a panel's halves.
// A row's sums do not depend on the other rows of its tile.

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr int64_t kTileRows = 16;
constexpr int64_t kLine = 32;  // bf16 elements of a cache line
constexpr int kIntoL1 = 3, kIntoL2 = 2;
constexpr int64_t kFarSteps = 4, kNearSteps = 2;

// One or two tiles of rows, `a` bytes-strided, by one panel of `steps` steps.
struct TileBlock {
    const bf16 *a;
    int64_t row_stride, step_stride, tile_stride;  // of A, in elements
    const bf16 *panel;
    int64_t steps;
    float *c;
    int64_t ldc;
    bool accumulate;
    const bf16 *next;    // what comes after the panel: it is brought into L2 meanwhile, if not null
    int64_t next_lines;  // of it, a step

    const bf16 *far = nullptr;  // what a tall block brings into L2, a tile a step

    // Where the weights lie that are met so many steps after this one.
    const bf16 *ahead(int64_t step, int64_t steps_ahead, int64_t stride) const {
        int64_t then = step + steps_ahead;
        return then < steps ? panel + then * stride : next + (then - steps) * stride;
    }
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

// Rows: the panel is met once and streams by. Panel: it stays in L1, and rows pass that by.
enum Reuse { kReuseRows, kReusePanel };

// Lines of weights that will be met once: into L2 long before, into L1 shortly before. They are
// spread over a step, since a burst of them would hold up what computes.
struct Ahead {
    const bf16 *far, *near;

    void fetch(int64_t begin, int64_t end) const {
        for (int64_t line = begin; line < end; line++) {
            __builtin_prefetch(far + line * kLine, 0, kIntoL2);
            __builtin_prefetch(near + line * kLine, 0, kIntoL1);
        }
    }
};

template <bool two_tiles>
inline void stream_step(const TileBlock &block, const bf16 *a, int64_t a_bytes, const bf16 *panel, const Ahead &ahead) {
    ahead.fetch(0, 6);
    _tile_loadd(6, panel, 64);
    ahead.fetch(6, 12);
    _tile_loadd(7, panel + kTile, 64);
    ahead.fetch(12, 18);
    _tile_loadd(4, a, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    ahead.fetch(18, 22);
    _tile_dpbf16ps(1, 4, 7);
    ahead.fetch(22, 27);
    if (two_tiles) {
        _tile_loadd(5, a + block.tile_stride, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
    }
    ahead.fetch(27, 32);
    if (two_tiles) _tile_dpbf16ps(3, 5, 7);
}

template <bool two_tiles>
inline void resident_step(const TileBlock &block, const bf16 *a, int64_t a_bytes, const bf16 *panel, const bf16 *next) {
    for (int64_t line = 0; line < block.next_lines; line++) __builtin_prefetch(next + line * kLine, 0, kIntoL2);
    _tile_loadd(6, panel, 64);
    _tile_loadd(7, panel + kTile, 64);
    _tile_stream_loadd(4, a, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (!two_tiles) return;
    _tile_stream_loadd(5, a + block.tile_stride, a_bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

template <bool two_tiles, Reuse reuse>
inline void multiply_block(const TileBlock &block) {
    settle_memory();
    block.accumulate ? load_sums<two_tiles>(block) : clear_sums();
    const bf16 *a = block.a, *panel = block.panel, *next = block.next;
    int64_t a_bytes = block.row_stride * sizeof(bf16);
    for (int64_t step = 0; step < block.steps; step++) {
        if (reuse == kReuseRows)
            stream_step<two_tiles>(block, a, a_bytes, panel, {block.ahead(step, kFarSteps / 2, 2 * kTile), block.ahead(step, kNearSteps / 2, 2 * kTile)});
        else
            resident_step<two_tiles>(block, a, a_bytes, panel, next);
        a += block.step_stride, panel += 2 * kTile, next += block.next_lines * kLine;
    }
    store_sums<two_tiles>(block);
}

template <Reuse reuse>
inline void multiply_rows(const TileBlock &block, int64_t tiles) {
    tiles > 1 ? multiply_block<true, reuse>(block) : multiply_block<false, reuse>(block);
}

// Three or four tiles of rows by one half of a panel: registers 0 .. 3 hold sums, 4 and 5 rows of
// A, 7 the weights.
template <int tiles>
inline void tall_step(const TileBlock &block, const bf16 *a, const bf16 *weight, const Ahead &ahead) {
    int64_t a_bytes = block.row_stride * sizeof(bf16);
    _tile_loadd(7, weight, 64);
    _tile_loadd(4, a, a_bytes);
    ahead.fetch(0, 4);
    _tile_loadd(5, a + block.tile_stride, a_bytes);
    _tile_dpbf16ps(0, 4, 7);
    ahead.fetch(4, 8);
    _tile_loadd(4, a + 2 * block.tile_stride, a_bytes);
    _tile_dpbf16ps(1, 5, 7);
    ahead.fetch(8, 12);
    if (tiles == 4) _tile_loadd(5, a + 3 * block.tile_stride, a_bytes);
    _tile_dpbf16ps(2, 4, 7);
    ahead.fetch(12, 16);
    if (tiles == 4) _tile_dpbf16ps(3, 5, 7);
}

template <int tiles>
inline void load_tall(const float *c, int64_t ldc) {
    int64_t bytes = ldc * sizeof(float), tile = kTileRows * ldc;
    _tile_loadd(0, c, bytes);
    _tile_loadd(1, c + tile, bytes);
    _tile_loadd(2, c + 2 * tile, bytes);
    if (tiles == 4) _tile_loadd(3, c + 3 * tile, bytes);
}

template <int tiles>
inline void store_tall(float *c, int64_t ldc) {
    int64_t bytes = ldc * sizeof(float), tile = kTileRows * ldc;
    _tile_stored(0, c, bytes);
    _tile_stored(1, c + tile, bytes);
    _tile_stored(2, c + 2 * tile, bytes);
    if (tiles == 4) _tile_stored(3, c + 3 * tile, bytes);
    settle_memory();
}

// `block.panel` is a half: its tiles alternate with those of the other. What is met later is fetched
// in the order in which it lies, half of it with each.
template <int tiles>
inline void multiply_tall(const TileBlock &block) {
    constexpr int64_t stride = 2 * kTile;
    settle_memory();
    block.accumulate ? load_tall<tiles>(block.c, block.ldc) : clear_sums();
    for (int64_t step = 0; step < block.steps; step++)
        tall_step<tiles>(block, block.a + step * block.step_stride, block.panel + step * stride,
                         {block.far + step * kTile, block.ahead(step, kNearSteps, stride)});
    store_tall<tiles>(block.c, block.ldc);
}

// Holds the tile configuration of the calling thread while it lives.
struct Tiles {
    Tiles() : Tiles(2 * kTileRows) {}

    // For products of exactly `rows` rows, at most two tiles: fewer rows take less time.
    explicit Tiles(int64_t rows) {
        TileConfig config;
        auto first = static_cast<uint8_t>(rows < kTileRows ? rows : kTileRows);
        auto second = static_cast<uint8_t>(rows > kTileRows ? rows - kTileRows : kTileRows);
        config.rows[0] = config.rows[1] = config.rows[4] = first;
        config.rows[2] = config.rows[3] = config.rows[5] = second;
        // The intrinsic tells the compiler of the record's first eight bytes only.
        __asm__ volatile("" ::"r"(&config) : "memory");
        _tile_loadconfig(&config);
    }
    Tiles(const Tiles &) = delete;
    ~Tiles() { _tile_release(); }
};
