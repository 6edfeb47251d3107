"""Counter-based random numbers: a draw is a function of (request seed, position) and nothing else.

Philox-4x32-10 (Salmon et al., SC'11) turns the pair into 53 uniform bits. It keeps no state, so a
draw is the same in any batch, row order, instance or replay. It runs on the host in integers
(one number a row is all that sampling needs), so every device sees the same numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Words = NDArray[np.uint64]

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
ROUNDS = 10
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
SEED_BITS = (1 << 64) - 1


def philox(counter: Sequence[Words], key: Sequence[Words]) -> tuple[Words, Words, Words, Words]:
    """Four 32-bit words for each counter of four and key of two 32-bit words, held in uint64."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        left, right = x0 * MULTIPLIERS[0], x2 * MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            (right >> HALF) ^ x1 ^ k0,
            right & LOW,
            (left >> HALF) ^ x3 ^ k1,
            left & LOW,
        )
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW, (k1 + KEY_STEPS[1]) & LOW
    return x0, x1, x2, x3


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (seed, position); seeds count modulo 2**64."""
    seed = np.array([seed & SEED_BITS for seed in seeds], dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    zero = np.zeros_like(position)
    counter = (position & LOW, position >> HALF, zero, zero)
    high, low, _, _ = philox(counter, (seed & LOW, seed >> HALF))
    bits = ((high >> np.uint64(5)) << np.uint64(26)) | (low >> np.uint64(6))
    return bits.astype(np.float64) * 2.0**-53
