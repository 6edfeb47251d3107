"""Processor time by thread, and what of it went to all but the busiest."""

import os

import pytest

from cluster.profiling.processor_time import family_times, spent_between


def test_a_process_that_runs_is_of_its_own_family():
    times = family_times(os.getpid())
    assert os.getpid() in {process for process, _ in times}
    assert min(times.values()) >= 0.0


def test_a_process_that_has_ended_has_no_family():
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    assert family_times(child) == {}


def test_the_busiest_threads_are_left_out():
    before = {(1, 1): 10.0, (1, 2): 5.0}
    after = {(1, 1): 14.0, (1, 2): 5.5, (2, 3): 0.25}
    assert spent_between(before, after, without_busiest=1) == pytest.approx(0.75)
    assert spent_between(before, after, without_busiest=0) == pytest.approx(4.75)
