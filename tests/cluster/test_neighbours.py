"""Processes that keep a machine busy while something else is measured on it."""

import threading
from multiprocessing import active_children

import pytest

from cluster.profiling.neighbours import busy_neighbours
from engine.errors import InstanceLost


def goes_on(begun):
    begun.set()
    threading.Event().wait()


def ends_at_once(begun):
    del begun


@pytest.fixture
def children():
    """Those that this test has begun."""
    before = set(active_children())
    return lambda: set(active_children()) - before


def test_neighbours_are_there_as_long_as_they_are_needed(children):
    with busy_neighbours(2, goes_on) as processes:
        assert len(processes) == 2
        assert {child.pid for child in children()} == set(processes)
    assert not children()


def test_one_that_does_not_begin_is_told_of(children):
    with pytest.raises(InstanceLost, match="did not start"), busy_neighbours(1, ends_at_once):
        pass
    assert not children()


def test_none_may_be_asked_for(children):
    with busy_neighbours(0, ends_at_once):
        assert not children()
