"""The garbage collector leaves what is loaded alone, and goes on with what comes after it."""

import gc
import weakref

import pytest

from cluster.collector import spare_what_is_loaded


class Cycle:
    def __init__(self) -> None:
        self.me = self


@pytest.fixture
def spared():
    loaded = Cycle()
    spare_what_is_loaded()
    yield loaded
    gc.unfreeze()


def test_what_is_loaded_is_looked_at_no_more(spared):
    assert gc.get_freeze_count() > 0
    assert not any(one is spared for one in gc.get_objects())


def test_what_comes_later_is_still_collected(spared):
    later = weakref.ref(Cycle())
    gc.collect()
    assert later() is None
