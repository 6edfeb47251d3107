"""How a worker is kept to its part of a GPU's multiprocessors."""

from __future__ import annotations

import pytest

from cluster.config import parse_config
from cluster.control.pools import Ground, initial_specs
from cluster.instance.gpu_share import PERCENTAGE, PIPES, limit_multiprocessors
from engine.errors import BadConfig


@pytest.fixture
def daemon(tmp_path):
    """The environment of a node where MPS's daemon has made its pipes."""
    (tmp_path / "control").touch()
    return {PIPES: str(tmp_path)}


@pytest.mark.parametrize(("share", "percentage"), [(0.4, "40"), (1.0, "100"), (0.125, "12.5")])
def test_cuda_is_told_the_share_as_a_percentage(daemon, share, percentage):
    limit_multiprocessors(share, "cuda", daemon)
    assert daemon[PERCENTAGE] == percentage


def test_without_the_daemon_a_share_is_refused(tmp_path):
    environ = {PIPES: str(tmp_path / "nowhere")}
    with pytest.raises(BadConfig, match=r"sm_share: 0\.4: needs the MPS daemon .*nowhere/control"):
        limit_multiprocessors(0.4, "cuda", environ)
    assert PERCENTAGE not in environ


def test_a_share_is_for_gpus(daemon):
    with pytest.raises(BadConfig, match="is for workers on GPUs"):
        limit_multiprocessors(0.4, "cpu", daemon)


def test_each_pools_workers_have_its_own_share():
    halves = {"resources": {"GPU": 0.5}}
    pools = {"prefill": {**halves, "sm_share": 0.7}, "decode": halves}
    prefill, decode = initial_specs(parse_config({"pools": pools}), Ground("cuda", owned=True))
    assert (prefill.sm_share, decode.sm_share) == (0.7, None)
    assert prefill.gpu_share == decode.gpu_share == 0.5


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_lies_above_0_and_not_above_1(share):
    with pytest.raises(BadConfig, match=r"pools\.decode\.sm_share"):
        parse_config({"pools": {"decode": {"sm_share": share}}})
