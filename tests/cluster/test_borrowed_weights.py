"""Weights that one process keeps for the workers of a GPU, here in the host's memory."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from itertools import count

import pytest
import torch

from cluster.config import parse_config
from cluster.instance import borrowed_weights, weight_keeper
from cluster.instance.borrowed_weights import borrow, borrow_weights, start_keeper
from cluster.instance.rank import borrowed
from cluster.instance.weight_keeper import Keeper, Wanted, listen
from cluster.instance.weight_memory import Exported
from cluster.roster import InstanceSpec
from engine.batch import Batch
from engine.checkpoint import open_checkpoint
from engine.errors import BadConfig, InstanceLost
from engine.messages import Role
from engine.ops import TorchOps
from engine.parallel import ALONE, Parallel
from engine.runner import Runner
from tests.cluster.host_weights import WAIT_S, HostMemory, starting
from tests.engine.driving import Greedy, chunk, generate

WANTED = Wanted("", "demo", None, "float32", "cpu", 0, 1, 0, 1)
NUMBERS = count()
EXPORTED = Exported(b"there", 3, 8)


@pytest.fixture
def wanted():
    return replace(WANTED, name=f"test-{os.getpid()}-{next(NUMBERS)}")


class Nowhere:
    """Memory of which only the handles are seen."""

    identity = "nowhere"

    def __init__(self):
        self.opened = []

    def open(self, exported):
        self.opened.append(exported)
        return torch.zeros(exported.nbytes, dtype=torch.uint8)

    def close(self, memory):
        self.opened.pop()


def nobody_starts(wanted):
    raise AssertionError(f"{wanted.name} is kept already")


class Kept:
    """A keeper in a thread, whose loading ends when the test says so."""

    def __init__(self, wanted):
        self.loaded = Future()
        self.progress = None
        self.began = threading.Event()
        self.thread = ThreadPoolExecutor(1)
        listener = listen(wanted.name)
        assert listener is not None
        self.ended = self.thread.submit(Keeper(listener, self._load).run)

    def _load(self, progress):
        self.progress = progress
        self.began.set()
        return self.loaded.result(WAIT_S)


def reader(wanted, memory, told=lambda *_: None):
    return borrow(wanted, EXPORTED.nbytes, memory, start=nobody_starts, progress=told)


def test_it_keeps_weights_for_as_long_as_anyone_reads_them(wanted):
    kept, memory = Kept(wanted), Nowhere()
    kept.loaded.set_result(EXPORTED)
    first = reader(wanted, memory)
    second = reader(wanted, memory)
    assert memory.opened == [EXPORTED, EXPORTED]
    first.close()
    third = reader(wanted, memory)
    for one in (second, third):
        one.check_alive()
        one.close()
    kept.ended.result(WAIT_S)
    assert not memory.opened


def test_readers_are_told_how_far_the_loading_is(wanted):
    kept, heard = Kept(wanted), []

    def told(*progress):
        heard.append(progress)
        if progress == (3, 10):
            kept.loaded.set_result(EXPORTED)
        else:
            kept.began.wait(WAIT_S)
            kept.progress(3, 10)

    reader(wanted, Nowhere(), told).close()
    assert heard[-1] == (3, 10)
    kept.ended.result(WAIT_S)


def test_it_ends_where_nobody_comes(wanted, monkeypatch):
    monkeypatch.setattr(weight_keeper, "FIRST_READER_S", 0.0)
    kept = Kept(wanted)
    kept.ended.result(WAIT_S)
    kept.loaded.set_result(EXPORTED)


def test_readers_whose_weights_cannot_be_loaded_are_let_down(wanted):
    starts = []

    def start(wanted):
        starts.append(Kept(wanted))
        starts[-1].loaded.set_exception(OSError("no room"))

    with pytest.raises(InstanceLost, match="no process keeps the weights of demo"):
        borrow(wanted, EXPORTED.nbytes, Nowhere(), start=start, progress=lambda *_: None)
    assert len(starts) == borrowed_weights.TRIES
    for kept in starts:
        with pytest.raises(OSError, match="no room"):
            kept.ended.result(WAIT_S)


def test_a_name_has_one_keeper_and_whoever_comes_second_leaves_it_alone(wanted):
    kept = Kept(wanted)
    assert listen(wanted.name) is None
    start_keeper(wanted)
    kept.loaded.set_result(EXPORTED)
    reader(wanted, Nowhere()).close()
    kept.ended.result(WAIT_S)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would keep the weights")
def test_a_process_of_its_own_that_finds_no_gpu_leaves_nobody_waiting(wanted, monkeypatch):
    monkeypatch.setattr(borrowed_weights, "TRIES", 1)
    with pytest.raises(InstanceLost, match="no process keeps the weights of demo"):
        borrow(wanted, 8, Nowhere(), start=start_keeper, progress=lambda *_: None)


def runner_over(weights):
    storage = None if weights is None else weights.storage()
    checkpoint = open_checkpoint("demo")
    return Runner(
        checkpoint, sampler=Greedy(), dtype="float32", blocks=4, ops=TorchOps(), storage=storage
    )


def test_workers_compute_with_the_weights_of_a_process_and_stop_when_it_is_killed():
    checkpoint, memory = open_checkpoint("demo"), HostMemory()
    told = []
    with starting() as starter:
        both = [
            borrow_weights(
                checkpoint,
                None,
                ALONE,
                dtype="float32",
                shared=memory,
                device="cpu",
                progress=lambda *progress: told.append(progress),
                start=starter,
            )
            for _ in range(2)
        ]
        assert len(starter.processes) == 1
        runners = [runner_over(weights) for weights in (None, *both)]
        prompt = Batch((chunk("a", range(5, 30), 0, range(4)),))
        wanted, *found = [runner.logits(prompt) for runner in runners]
        assert all(torch.equal(wanted, one) for one in found)
        starter.processes[0].kill()
        starter.processes[0].join(WAIT_S)
        own, *borrowing = runners
        assert len(generate(own, range(5, 9), 1, range(4))) == 1
        for runner in borrowing:
            with pytest.raises(InstanceLost, match="keeps the weights has ended"):
                generate(runner, range(5, 9), 1, range(4))
    for weights in both:
        weights.close()
    assert memory.opened == 0
    for runner in runners:
        runner.close()


def names_of(monkeypatch, **parts):
    """Under what weights would be looked for."""
    found = []
    monkeypatch.setattr(borrowed_weights, "borrow", lambda wanted, *_, **__: found.append(wanted))
    given = {"parallel": ALONE, "dtype": "float32", "gpu": "cuda:a"} | parts
    memory = Nowhere()
    memory.identity = given["gpu"]
    borrow_weights(
        open_checkpoint("demo"),
        None,
        given["parallel"],
        dtype=given["dtype"],
        shared=memory,
        device="cuda",
        progress=lambda *_: None,
    )
    return found[0].name


def test_only_the_same_weights_on_the_same_gpu_have_the_same_name(monkeypatch):
    others = [{"parallel": Parallel(tensor_size=2)}, {"dtype": "bfloat16"}, {"gpu": "cuda:b"}]
    names = [names_of(monkeypatch, **parts) for parts in ({}, *others)]
    assert len(set(names)) == len(names)
    assert names_of(monkeypatch) == names[0]


def test_weights_have_a_name_where_the_package_is_not_installed(monkeypatch):
    def not_installed(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.distribution", not_installed)
    assert names_of(monkeypatch)


def test_weights_that_other_code_loads_have_another_name(monkeypatch, tmp_path):
    name, changed = names_of(monkeypatch), tmp_path / "loading.py"
    changed.write_text("NOT_AS_BEFORE = True")
    monkeypatch.setattr(borrowed_weights, "_loading_code", lambda: [changed])
    assert names_of(monkeypatch) != name


HALF = {"resources": {"GPU": 0.5}}


def config_of(prefill=HALF, decode=HALF, device="cuda"):
    pools = {"prefill": prefill, "decode": decode}
    return {"engine": {"share_weights": True}, "pools": pools, "device": device}


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (config_of(device="cpu"), "must be false where device is cpu"),
        (config_of(prefill={}), r"resources\.GPU to be below 1"),
        (config_of(decode=HALF | {"tensor_parallel": 2}), "tensor_parallel and pipeline_parallel"),
    ],
)
def test_sharing_is_refused_where_it_cannot_be(values, why):
    with pytest.raises(BadConfig, match=why):
        parse_config(values)


def test_a_worker_that_turns_out_to_have_no_gpu_refuses_to_share():
    config = parse_config(config_of(device="auto"))
    spec = InstanceSpec("decode-0", Role.DECODE, "cpu")
    with pytest.raises(BadConfig, match=r"share_weights.* is for workers on GPUs"):
        borrowed(
            config, spec, open_checkpoint("demo"), ALONE, dtype="float32", progress=lambda *_: None
        )
