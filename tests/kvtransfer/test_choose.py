"""Which transport joins two ranks, and that it is said."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest

from engine.errors import BadConfig, TransportError, Unsupported
from kvtransfer import nixl
from kvtransfer.auto import AutoMetadata, AutoTransport
from kvtransfer.choose import Offered, choose
from kvtransfer.shared_memory import shared_pool
from kvtransfer.transport import Pool, decode_metadata, encode_metadata
from tests.kvtransfer.peers import TRANSPORTS, pieces

CPU = Offered("here", "cpu", ("nixl", "shared_memory"))
GPU = Offered("here", "cuda:first", ("nccl", "nixl"))
IPC = Offered("here", "cuda:first", ("cuda_ipc", "nixl"))


@pytest.mark.parametrize(
    ("local", "remote", "name", "why"),
    [
        (CPU, CPU, "shared_memory", "one host's memory"),
        (CPU, replace(CPU, host="there"), "nixl", "different hosts"),
        (GPU, replace(GPU, device="cuda:1"), "nixl", "CUDA IPC"),
        (GPU, replace(GPU, host="there"), "nixl", "different hosts"),
        (CPU, GPU, "nixl", "lies on a GPU"),
        (IPC, IPC, "cuda_ipc", "one GPU"),
        (IPC, replace(IPC, device="cuda:second"), "nixl", "CUDA IPC"),
        (IPC, GPU, "nixl", "not cuda_ipc: the other rank has not opened it"),
        (GPU, IPC, "nixl", "not cuda_ipc: this rank has not opened it"),
    ],
)
def test_auto_picks_the_fastest_that_joins_the_two(local, remote, name, why):
    choice = choose(local, remote)
    assert choice.name == name
    assert why in choice.why


def test_what_the_config_asks_for_is_used():
    assert choose(CPU, CPU, "nixl").name == "nixl"
    assert choose(GPU, replace(GPU, device="cuda:1"), "nccl").name == "nccl"


@pytest.mark.parametrize(
    ("local", "remote", "preference", "why"),
    [
        (CPU, replace(CPU, host="there"), "shared_memory", "different hosts"),
        (GPU, GPU, "shared_memory", "lies on a GPU"),
        (CPU, CPU, "nccl", "between GPUs only"),
        (CPU, CPU, "cuda_ipc", "pools on one GPU only"),
        (IPC, replace(IPC, host="there"), "cuda_ipc", "pools on one GPU only"),
        (IPC, GPU, "cuda_ipc", "the other rank has not opened it"),
        (GPU, GPU, "nccl", "two ranks on one GPU"),
        (CPU, replace(CPU, transports=()), "nixl", "the other rank has not opened it"),
        (replace(CPU, transports=()), CPU, "auto", "shared_memory: this rank .*; nixl: this"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(local, remote, preference, why):
    with pytest.raises(Unsupported, match=f"^transfer.transport {preference}: .*{why}"):
        choose(local, remote, preference)


def test_an_unknown_transport_is_bad_config():
    with pytest.raises(BadConfig, match="did you mean 'nixl'"):
        choose(CPU, CPU, "nixel")


@pytest.fixture
def pair():
    pools = [shared_pool(1 << 16) for _ in range(2)]
    ends = [AutoTransport(name, pool) for name, pool in zip("ab", pools, strict=True)]
    yield ends, pools
    for end in ends:
        end.close()


def test_auto_moves_bytes_and_logs_which_transport_and_why(pair, caplog):
    (a, b), pools = pair
    pools[0].bytes()[:] = 9
    with caplog.at_level(logging.INFO, logger="kvtransfer.auto"):
        b.connect("a", a.metadata("b"))
    assert "peer=a transport=shared_memory why=both pools lie in one host's memory" in caplog.text
    assert b.uses("a") == "shared_memory"
    assert b.serve("a", pieces((0, 0, 1))).done()
    b.pull("a", pieces((0, 0, 1 << 16))).wait(30)
    assert np.array_equal(pools[0].bytes(), pools[1].bytes())
    b.disconnect("a")
    with pytest.raises(TransportError, match="not connected"):
        b.pull("a", pieces((0, 0, 1)))


@pytest.mark.skipif("nixl" not in TRANSPORTS, reason="nixl cannot be imported here")
def test_auto_reaches_a_peer_of_another_host_by_nixl(pair):
    (a, b), pools = pair
    pools[0].bytes()[:] = 9
    found = decode_metadata("auto", AutoMetadata, a.metadata("b"))
    elsewhere = replace(found, offered=replace(found.offered, host="elsewhere"))
    b.connect("a", encode_metadata("auto", elsewhere))
    assert b.uses("a") == "nixl"
    b.pull("a", pieces((0, 0, 1 << 16))).wait(30)
    assert np.array_equal(pools[0].bytes(), pools[1].bytes())


def test_metadata_that_lacks_what_it_offers_is_refused(pair):
    (a, b), _ = pair
    found = decode_metadata("auto", AutoMetadata, a.metadata("b"))
    with pytest.raises(TransportError, match="sent no metadata for it"):
        b.connect("a", encode_metadata("auto", replace(found, parts=())))


def test_a_connection_that_fails_leaves_no_trace(pair):
    (a, b), _ = pair
    metadata = a.metadata("b")
    a.close()
    b.connect("a", metadata)
    b.disconnect("a")
    with pytest.raises(TransportError, match="not connected"):
        b.uses("a")


def test_an_explicit_preference_opens_nothing_else():
    end = AutoTransport("a", shared_pool(4096), preference="shared_memory")
    found = decode_metadata("auto", AutoMetadata, end.metadata("b"))
    assert [part.transport for part in found.parts] == ["shared_memory"]
    end.close()
    with pytest.raises(Unsupported, match="needs a pool on a memfd"):
        AutoTransport("a", Pool.of_array(np.zeros(8, np.uint8)), preference="shared_memory")


class Refusing:
    """A transport whose driver does not take the pool."""

    def __init__(self, *_: object) -> None:
        raise TransportError("the driver refuses the pool")


def test_auto_goes_on_without_what_fails_to_open_and_says_why(monkeypatch, caplog):
    monkeypatch.setattr(nixl, "NixlTransport", Refusing)
    ends = [AutoTransport(name, shared_pool(4096)) for name in "ab"]
    assert "rank=a transport=nixl why=the driver refuses the pool" in caplog.text
    ends[1].connect("a", ends[0].metadata("b"))
    assert ends[1].uses("a") == "shared_memory"
    for end in ends:
        end.close()


def test_what_was_asked_for_and_fails_to_open_is_an_error(monkeypatch):
    monkeypatch.setattr(nixl, "NixlTransport", Refusing)
    with pytest.raises(TransportError, match="the driver refuses the pool"):
        AutoTransport("a", shared_pool(4096), preference="nixl")


def test_what_is_chosen_among_fewer_was_not_asked_for(caplog):
    ends = [AutoTransport(name, shared_pool(4096), among=("shared_memory",)) for name in "ab"]
    with caplog.at_level(logging.INFO, logger="kvtransfer.auto"):
        ends[1].connect("a", ends[0].metadata("b"))
    assert "transport=shared_memory why=both pools lie in one host's memory" in caplog.text
    for end in ends:
        end.close()
