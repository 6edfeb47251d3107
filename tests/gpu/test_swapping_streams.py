"""Swaps on a stream of their own, beside passes that keep the device busy."""

from __future__ import annotations

import pytest
import torch

from engine.batch import Swap
from engine.swapping import DeviceLane, Swapper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
BLOCKS, BLOCK_BYTES = 64, 2 << 20
LEAVING = tuple(range(8, 40))


def keep_busy() -> torch.Tensor:
    """Asks for work that the device is still at when the call has long returned."""
    matrix = torch.ones(4096, 4096, device="cuda")
    for _ in range(20):
        matrix = matrix @ matrix * 1e-4
    return matrix


def test_blocks_leave_as_the_passes_before_left_them_and_come_back_elsewhere() -> None:
    pool = torch.zeros(BLOCKS, BLOCK_BYTES, dtype=torch.uint8, device="cuda")
    slots = torch.zeros(len(LEAVING), BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)
    swapper = Swapper(pool, slots, DeviceLane(pool.device))
    wanted = torch.arange(BLOCKS, dtype=torch.uint8)[:, None]
    busy = keep_busy()
    pool.copy_(wanted.cuda().expand_as(pool))  # a pass that has not happened yet
    out = Swap("a", LEAVING, tuple(range(len(LEAVING))), to_host=True)
    with swapper.swapping((out,), LEAVING[:4]):
        pool[LEAVING[0] : LEAVING[4]] = 255
    assert torch.equal(slots, wanted[list(LEAVING)].expand_as(slots))
    back = Swap("a", tuple(range(len(LEAVING))), out.host_slots, to_host=False)
    with swapper.swapping((back,), back.blocks):
        seen = pool[: len(LEAVING)].clone()
    assert torch.equal(seen.cpu(), slots)
    assert busy.isfinite().all()
