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


def test_what_computes_is_told_from_the_loop_around_it_and_from_all_else():
    before = {(1, 1): 10.0, (1, 2): 5.0}
    after = {(1, 1): 14.0, (1, 2): 5.5, (1, 3): 0.125, (2, 4): 0.25}
    spent = spent_between(before, after, computing=1)
    assert spent.passes_s == pytest.approx(4.0)
    assert spent.loops_s == pytest.approx(0.5)
    assert spent.doors_s == pytest.approx(0.375)


def test_threads_that_compute_together_have_one_loop_around_them():
    after = {(1, 1): 4.0, (1, 2): 3.5, (1, 3): 0.5, (1, 4): 0.25, (2, 5): 1.0}
    spent = spent_between({}, after, computing=2)
    assert spent == pytest.approx((7.5, 0.5, 1.25))


def test_all_is_for_doors_where_nothing_computes():
    assert spent_between({}, {(1, 1): 4.0, (1, 2): 1.0}, computing=0) == (0.0, 0.0, 5.0)
