"""Scattered copies as one kernel, in Triton's interpreter, where addresses are the host's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tests.engine.triton_here  # noqa: F401  # before the kernels
from kvtransfer import triton_copy
from kvtransfer.copying import copy_by_memmove
from tests.kvtransfer.peers import pattern, pieces

NBYTES = 1 << 17
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "rows",
    [
        ((0, 8, 64),),
        ((40_000, 0, 8 * triton_copy.CHUNK_WORDS + 8), (8, 90_000, 16), (0, 80_000, 0)),
        ((1, 70_000, 5000), (9000, 3, 1), (20_000, 9001, 777)),
        ((64, 64, 0),),
    ],
    ids=["one", "words", "bytes", "nothing"],
)
def test_pieces_are_copied_as_by_memmove(rows: tuple[tuple[int, int, int], ...]) -> None:
    source, target = pattern(NBYTES, 1), pattern(NBYTES, 2)
    expected, copies = target.copy(), pieces(*rows)
    copy_by_memmove(expected.ctypes.data, source.ctypes.data, copies)
    triton_copy.copy_pieces(target.ctypes.data, source.ctypes.data, copies, CPU)
    assert np.array_equal(target, expected)
