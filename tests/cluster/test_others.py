"""What others take of this machine, while something is measured."""

import os
from dataclasses import dataclass

import pytest

from cluster.profiling.others import DISTURBING_CORES, Others, least_disturbed

CHILD, GRANDCHILD, STRANGER = 100_001, 100_002, 100_003
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Work:
    number: int
    others: float


def works(*others):
    left = [Work(number, cores) for number, cores in enumerate(others)]
    return lambda: left.pop(0)


def test_what_nobody_disturbed_is_not_done_again():
    assert least_disturbed(works(DISTURBING_CORES), 3).number == 0


def test_it_is_done_again_until_nobody_disturbs():
    assert least_disturbed(works(0.5, 0.4, 0.0, 0.0), 4).number == 2


def test_of_many_tries_the_least_disturbed_counts():
    assert least_disturbed(works(0.5, 0.4, 0.6, 0.0), 3).number == 1


class Proc:
    """As the kernel tells of its processes."""

    def __init__(self, folder):
        self.folder = folder
        self.now_s = 0.0
        self.idle, self.stolen_s = 10_000, 7.0
        self.seconds = {os.getpid(): 1.0, CHILD: 1.0, GRANDCHILD: 1.0, STRANGER: 1.0}
        self.work({})

    def work(self, seconds, for_s=0.0):
        self.now_s += for_s
        for process, taken_s in seconds.items():
            self.seconds[process] += taken_s
        parents = {CHILD: os.getpid(), GRANDCHILD: CHILD}
        for process, taken_s in self.seconds.items():
            ticks = round(taken_s * TICKS)
            directory = self.folder / str(process)
            directory.mkdir(exist_ok=True)
            parent = parents.get(process, 1)
            fields = f"{process} (a (b) c) S {parent} {'0 ' * 9}{ticks - 5} 5 0 0"
            (directory / "stat").write_text(fields)
        busy = round(sum(self.seconds.values()) * TICKS)
        stolen = round(self.stolen_s * TICKS)
        fields = f"{busy - 9} 4 5 {self.idle} 7 0 0 {stolen} 0 0"
        (self.folder / "stat").write_text(f"cpu  {fields}\ncpu0 0\n")


@pytest.fixture
def proc(tmp_path):
    return Proc(tmp_path)


@pytest.fixture
def others(proc):
    return Others(lambda: proc.now_s, proc.folder)


def test_what_this_process_and_its_descendants_take_is_not_of_others(proc, others):
    proc.work({os.getpid(): 2.0, CHILD: 1.0, GRANDCHILD: 1.0}, for_s=4.0)
    assert others.cores == pytest.approx(0.0, abs=0.01)


def test_what_others_take_is_told_in_cores(proc, others):
    proc.work({CHILD: 2.0, STRANGER: 3.0}, for_s=4.0)
    assert others.cores == pytest.approx(0.75, abs=0.01)


def test_a_machine_that_waits_does_not_work(proc, others):
    proc.idle += 100 * TICKS
    proc.work({}, for_s=4.0)
    assert others.cores == pytest.approx(0.0, abs=0.01)


def test_what_the_host_gives_to_its_other_guests_is_of_others(proc, others):
    proc.stolen_s += 1.0
    proc.work({STRANGER: 3.0}, for_s=4.0)
    assert others.cores == pytest.approx(1.0, abs=0.01)


def test_what_is_stolen_counts_where_a_kernel_adds_it_to_the_processes(proc, others):
    proc.stolen_s += 2.0
    proc.work({CHILD: 2.0, STRANGER: -2.0}, for_s=4.0)  # so the machine itself was not busy
    assert others.cores == pytest.approx(0.5, abs=0.01)
