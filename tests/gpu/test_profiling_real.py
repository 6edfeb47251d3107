"""What `tandem profile` measures of a GPU, with KV of each dtype."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pydantic", reason="profiling reads the config's models")

from cluster.profiling.measure import Device, Measuring, measure
from placement.latency.measured import fit_run
from placement.latency.profile_file import profile_from

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def profile_of(kv_dtype: str):
    device = Device("cuda", "h100-80gb")
    settings = Measuring("demo", device, kv_dtype=kv_dtype, rounds=1, quick=True)
    return measure(settings, lambda _done, _all: None)


def test_kv_in_8_bits_takes_half_of_the_memory_and_its_passes_are_fitted_too():
    wide, narrow = profile_of("auto"), profile_of("float8_e4m3fn")
    assert narrow["dtype"] == wide["dtype"]
    assert narrow["kv_dtype"] == "float8_e4m3fn"
    assert 2 * narrow["kv_bytes_per_token"] == wide["kv_bytes_per_token"]
    for document in (wide, narrow):
        (run,) = profile_from(document).runs
        costs, _ = fit_run(run)
        assert costs.fixed_s(64, 1) > 0
