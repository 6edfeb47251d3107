// What every kernel file shares: argument records, the table of one instruction set, the pool.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tandem {

using bf16 = uint16_t;

enum Dtype : int64_t { kFloat32 = 0, kBfloat16 = 1 };
enum Activation : int64_t { kSilu = 0, kGeluTanh = 1, kRelu = 2 };

// The records below arrive from Python as packed bytes: every field is eight bytes wide. Whoever
// changes one counts the interface up, here and in engine/native_library.py.
constexpr int64_t kInterface = 5;

struct LinearArgs {
    const void *x;       // [rows, in_features], rows x_stride elements apart
    const void *weight;  // packed panels
    const void *bias;    // null, or [out_features] of the same dtype
    void *y;             // [rows, out_features]; fp32 if wide, else as x
    int64_t rows, in_features, out_features, x_stride, dtype, wide;
};

// Before each record in a run of calls: 0 linear, 1 norm, 2 activation, 3 place, 4 attention.
struct CallHeader {
    int64_t kernel, record_bytes;
};

struct PackArgs {
    const void *weight;  // [out_features, in_features], rows contiguous
    void *packed;
    int64_t in_features, out_features, row_stride, dtype;
};

struct UnpackArgs {
    const void *packed;
    const int64_t *rows;  // which of the weight
    void *y;              // [count, in_features]
    int64_t count, in_features, out_features, dtype;
};

struct NormArgs {
    const void *x;
    void *residual;       // null, or what x is added to in place before the norm
    const float *weight;
    const float *bias;    // null for an RMS norm
    void *y;
    int64_t rows, features, dtype;
    double eps;
};

struct ActivationArgs {
    const void *x;  // [rows, features], or [rows, 2 * features] if gated
    void *y;
    int64_t rows, features, kind, gated, dtype;
};

// One layer of the pool; strides in elements, dimensions of a head contiguous.
struct KvView {
    char *key, *value;
    int64_t block_stride, head_stride, token_stride, block_tokens, kv_heads, head_dim;
};

struct PlaceArgs {
    void *qkv;  // [tokens, heads + 2 * kv_heads, head_dim]
    KvView kv;
    const int64_t *positions, *slots;
    const float *rotary;  // null, or [positions, rotary_dim]: cosines, then sines
    const float *query_norm, *key_norm;  // both null or neither
    int64_t tokens, heads, rotary_dim, dtype;
    double eps;
};

struct AttentionArgs {
    const void *query;  // [tokens, heads, head_dim], tokens query_stride elements apart
    void *out;          // contiguous
    KvView kv;
    const int32_t *cu_seqlens, *context_lens, *block_tables;
    int64_t sequences, heads, query_stride, table_stride, dtype;
    int64_t window;  // 0: unbounded
    double scale;
    double soft_cap;  // 0: none
};

struct HighestArgs {
    const float *rows;  // [count, columns], rows row_stride elements apart
    float *maxima;      // [count], not finite if the row holds NaN
    int64_t *places;    // [count], the first of equals
    int64_t count, columns, row_stride;
};

// The kernels of one instruction set.
struct Kernels {
    void (*linear)(const LinearArgs &);
    void (*norm)(const NormArgs &);
    void (*activation)(const ActivationArgs &);
    void (*place)(const PlaceArgs &);
    void (*attention)(const AttentionArgs &);
    void (*highest)(const HighestArgs &);
};

extern const Kernels scalar_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels, amx_kernels;
constexpr int64_t kInstructionSets = 5;
#else
constexpr int64_t kInstructionSets = 1;
#endif

struct InstructionSet {
    const char *name;
    bool (*usable)();
    const Kernels *kernels;
};

extern const InstructionSet instruction_sets[kInstructionSets];  // best first

// Weights are packed in panels of 32 columns, zero padded, one format for every instruction set.
// bf16: [panel][in_features / 32][half][16 pairs of rows][16 columns][2], so that 1 KB is one AMX
// tile and 64 bytes are one operand of vdpbf16ps. fp32: [panel][in_features][32].
constexpr int64_t kPanel = 32;
constexpr int64_t kStep = 32;
constexpr int64_t kTile = 512;  // bf16 elements of an AMX tile
constexpr int64_t kMaxHeadDim = 512;

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

void pack(const PackArgs &args);

// Rows of a weight as they were; false, and nothing done, if it has not all of them.
bool unpack(const UnpackArgs &args);

// Reads everything once, on all threads; returns what the words fold to.
uint64_t read_memory(const void *data, int64_t bytes);

// Streaming through 4 KB pages costs a tenth of the bandwidth; ask before the first write.
void use_huge_pages(void *data, int64_t bytes);

// The same for what is written already, where the kernel can.
void collapse_pages(void *data, int64_t bytes);

// --- threads ---------------------------------------------------------------------------------

void set_threads(int64_t threads);
int64_t threads();

// Calls body(context, task) for each task in 0 .. tasks - 1, on all threads; returns when all ended.
void run_tasks(int64_t tasks, void (*body)(void *, int64_t), void *context);

template <class Body>
void parallel(int64_t tasks, const Body &body) {
    auto call = [](void *context, int64_t task) { (*static_cast<const Body *>(context))(task); };
    run_tasks(tasks, call, const_cast<Body *>(&body));
}

// Cuts 0 .. count into runs of about `grain` and calls body(begin, end) for each.
template <class Body>
void parallel_ranges(int64_t count, int64_t grain, const Body &body) {
    parallel(ceil_div(count, grain), [&](int64_t task) {
        int64_t begin = task * grain;
        body(begin, begin + grain < count ? begin + grain : count);
    });
}

// A buffer of the calling thread, 64-byte aligned, that keeps its content until the next call
// with the same slot.
enum ScratchSlot { kInput, kSums, kQuery, kKeys, kValues, kScores, kWeights, kOutput, kScratchSlots };
void *scratch(ScratchSlot slot, size_t bytes);

}  // namespace tandem
