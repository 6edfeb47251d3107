"""Processor time by thread, and what it was for."""

import os
import threading

import pytest

from cluster.profiling.processor_time import Thread, family_times, spent_between
from cluster.thread_names import LOOP, PASSES, name_thread


def test_a_process_that_runs_is_of_its_own_family():
    times = family_times(os.getpid())
    assert os.getpid() in {thread.process for thread in times}
    assert min(times.values()) >= 0.0


def test_a_process_that_has_ended_has_no_family():
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    assert family_times(child) == {}


def test_what_computes_is_told_from_the_loop_around_it_and_from_all_else():
    before = {Thread(1, 1, PASSES): 10.0, Thread(1, 2, LOOP): 5.0}
    after = {Thread(1, 1, PASSES): 14.0, Thread(1, 2, LOOP): 5.5, Thread(1, 3, LOOP): 0.125}
    spent = spent_between(before, {**after, Thread(2, 4, "client"): 0.25})
    assert spent == pytest.approx((4.0, 0.5, 0.375))


def test_every_instance_has_a_loop_of_its_own():
    after = {Thread(1, 1, PASSES): 4.0, Thread(1, 2, LOOP): 0.5, Thread(1, 3, PASSES): 3.5}
    spent = spent_between({}, {**after, Thread(2, 4, LOOP): 0.25, Thread(2, 5, "python"): 1.0})
    assert spent == pytest.approx((7.5, 0.75, 1.0))


def test_a_thread_is_found_by_the_name_that_it_was_given():
    def compute():
        name_thread(PASSES)
        found.update(family_times(os.getpid()))

    found = {}
    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    assert Thread(os.getpid(), thread.native_id, PASSES) in found
