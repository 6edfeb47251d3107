// Weights of scores that stand turned: a token a row, sixteen rows of queries in the lanes. Sums run
// in the order of `weigh`, so that a token attends alike wherever it is computed.

constexpr int64_t kRunTokens = 16;  // of a block, met together
constexpr int64_t kTileRuns = kTileTokens / kRunTokens;
constexpr int64_t kTileSteps = kTileTokens / kStep;
constexpr int64_t kColumns = 4 * 16;      // of values, whose sums stay in tiles together

// Two rows of weights as pairs of bf16.
inline __m512i pair_up(Vec even, Vec odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                                           19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd.v, even.v)));
}

// Turns sixteen tokens' scores into weights; `tick` is called for each pair of them.
template <class Tick>
inline void weigh_run(const float *scores, Vec peak, Vec (&parts)[16], uint32_t *pairs, Tick tick) {
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        Vec even = power_of_two(load(scores + i * 16) - peak), odd = power_of_two(load(scores + (i + 1) * 16) - peak);
        parts[i] = parts[i] + even, parts[i + 1] = parts[i + 1] + odd;
        _mm512_store_si512(pairs + i / 2 * 16, pair_up(even, odd));
        tick();
    }
}

// In the order of `sum` over lanes.
inline Vec sum_up(Vec (&parts)[16]) {
#pragma GCC unroll 4
    for (int half = 8; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++) parts[i] = parts[i] + parts[i + half];
    return parts[0];
}
