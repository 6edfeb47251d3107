// Lays a weight out in panels, once, at load time, and finds rows of it there.
#include "kernels.h"

#include <algorithm>
#include <cstring>

namespace tandem {
namespace {

// One tile: 16 columns of weight rows, 16 pairs of each.
void pack_tile(const bf16 *weight, int64_t row_stride, int64_t columns, int64_t pairs, bf16 *out) {
    for (int64_t n = 0; n < columns; n++)
        for (int64_t pair = 0; pair < pairs; pair++)
            std::memcpy(out + pair * 32 + n * 2, weight + n * row_stride + pair * 2, 2 * sizeof(bf16));
}

void pack_panel_bf16(const PackArgs &args, int64_t panel) {
    int64_t steps = ceil_div(args.in_features, kStep);
    bf16 *out = static_cast<bf16 *>(args.packed) + panel * steps * 2 * kTile;
    std::memset(out, 0, steps * 2 * kTile * sizeof(bf16));
    for (int64_t tile = 0; tile < 2 * steps; tile++, out += kTile) {
        int64_t first = panel * kPanel + tile % 2 * 16, k = tile / 2 * kStep;
        int64_t columns = std::clamp<int64_t>(args.out_features - first, 0, 16);
        int64_t depth = std::min(args.in_features - k, kStep);
        auto weight = static_cast<const bf16 *>(args.weight) + first * args.row_stride + k;
        pack_tile(weight, args.row_stride, columns, depth / 2, out);
        for (int64_t n = 0; n < columns && depth % 2; n++)
            out[depth / 2 * 32 + n * 2] = weight[n * args.row_stride + depth - 1];
    }
}

void pack_panel_fp32(const PackArgs &args, int64_t panel) {
    float *out = static_cast<float *>(args.packed) + panel * args.in_features * kPanel;
    std::memset(out, 0, args.in_features * kPanel * sizeof(float));
    for (int64_t n = 0; n < kPanel && panel * kPanel + n < args.out_features; n++) {
        auto row = static_cast<const float *>(args.weight) + (panel * kPanel + n) * args.row_stride;
        for (int64_t k = 0; k < args.in_features; k++) out[k * kPanel + n] = row[k];
    }
}

void unpack_row_bf16(const UnpackArgs &args, int64_t row, bf16 *out) {
    int64_t steps = ceil_div(args.in_features, kStep), column = row % kPanel;
    auto from = static_cast<const bf16 *>(args.packed) + row / kPanel * steps * 2 * kTile + column / 16 * kTile + column % 16 * 2;
    int64_t pairs = args.in_features / 2;
    for (int64_t pair = 0; pair < pairs; pair++)
        std::memcpy(out + 2 * pair, from + pair / 16 * 2 * kTile + pair % 16 * 32, 2 * sizeof(bf16));
    if (args.in_features % 2) out[2 * pairs] = from[pairs / 16 * 2 * kTile + pairs % 16 * 32];
}

void unpack_row_fp32(const UnpackArgs &args, int64_t row, float *out) {
    auto from = static_cast<const float *>(args.packed) + row / kPanel * args.in_features * kPanel + row % kPanel;
    for (int64_t k = 0; k < args.in_features; k++) out[k] = from[k * kPanel];
}

}  // namespace

void pack(const PackArgs &args) {
    int64_t panels = ceil_div(args.out_features, kPanel);
    parallel(panels, [&](int64_t panel) {
        args.dtype == kBfloat16 ? pack_panel_bf16(args, panel) : pack_panel_fp32(args, panel);
    });
}

bool unpack(const UnpackArgs &args) {
    auto exists = [&](int64_t row) { return row >= 0 && row < args.out_features; };
    if (!std::all_of(args.rows, args.rows + args.count, exists)) return false;
    constexpr int64_t grain = 8;
    parallel_ranges(args.count, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            if (args.dtype == kBfloat16)
                unpack_row_bf16(args, args.rows[i], static_cast<bf16 *>(args.y) + i * args.in_features);
            else
                unpack_row_fp32(args, args.rows[i], static_cast<float *>(args.y) + i * args.in_features);
        }
    });
    return true;
}

}  // namespace tandem
