"""What a process takes the time to import before it serves, seen in a fresh one."""

from __future__ import annotations

import subprocess
import sys

import pytest

GATEWAY = """
import cluster.deploy
from cluster.config import parse_config
from cluster.gateway.front import read_model

read_model(parse_config({})).result()
"""
WORKER = """
from cluster.config import parse_config
from cluster.instance.rank import lead_ranks, load_rank
from cluster.instance.warm_up import warm_up, warm_up_batches
from cluster.roster import InstanceSpec
from engine.messages import Role

def tell(done, whole):
    pass

spec = InstanceSpec("one", Role.MIXED, "cpu")
config = parse_config({"engine": {"kv_bytes": 1 << 22}})
loaded = load_rank(config, spec, 0, "", one_host=True, progress=tell)
batches = warm_up_batches(loaded.blocks, 16, 64, 2, longest=loaded.checkpoint.max_length)
warm_up(lead_ranks(loaded.runner), batches, tell)
"""


@pytest.mark.parametrize(
    ("work", "spared"), [(GATEWAY, "torch"), (WORKER, "torch._dynamo")], ids=["gateway", "worker"]
)
def test_a_process_does_not_import_what_it_never_uses(work: str, spared: str) -> None:
    """Either costs it seconds and over 100 MB."""
    program = f"{work}\nimport sys\nsys.exit({spared!r} in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], check=False)
    assert ended.returncode == 0
