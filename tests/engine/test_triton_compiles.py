"""What becomes of the Triton kernels on a Hopper GPU, none of which is needed for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SHARED_BYTES = 99 << 10
"""What a program may hold on the smallest GPUs of the last generations."""


def rows_of(module: str) -> list[list[str]]:
    """What a module prints where kernels are compiled, not interpreted."""
    pytest.importorskip("triton", "3.6", reason="nobody has compiled them with an older one")
    alone = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", module]
    told = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    return [line.split() for line in told.stdout.splitlines()]


def test_every_kernel_compiles_and_fits_the_shared_memory_of_small_gpus() -> None:
    rows = rows_of("tests.engine.compile_kernels")
    assert [name for name, _, _ in rows] == [
        "_norm",
        "_gate",
        "_place",
        "_place",
        "_chunk_kernel",
        "_chunk_kernel",
        "_split_kernel",
        "_split_kernel",
        "_join_kernel",
        "_multiply",
        "_place_rows",
        "_survey",
        "_draw",
        "_copy",
    ]
    assert all(int(shared) <= SHARED_BYTES and int(code) > 0 for _, shared, code in rows)


def test_passes_of_any_size_run_the_kernels_that_others_had_compiled() -> None:
    assert rows_of("tests.engine.launch_kernels") == [
        [name, "1"]
        for name in (
            "_chunk_kernel",
            "_copy",
            "_draw",
            "_gate",
            "_join_kernel",
            "_multiply",
            "_norm",
            "_place",
            "_place_rows",
            "_split_kernel",
            "_survey",
        )
    ]
