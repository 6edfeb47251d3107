"""What the controller makes of the instances' loads."""

import pytest

from cluster.control.controller import owner_of
from engine.errors import NotFound
from tests.cluster.test_journal import listing


def listed(**states: str):
    names = {name.replace("_", "-"): state for name, state in states.items()}
    return {name: listing(name, 1, state) for name, state in names.items()}


@pytest.mark.parametrize(
    ("loads", "owner"),
    [
        (listed(decode_0="reserved", prefill_0="held"), "prefill-0"),
        (listed(decode_0="copying", decode_1="running"), "decode-1"),
        (listed(decode_0="committed", decode_1="running"), "decode-1"),
        (listed(decode_0="committed", decode_1="copying"), "decode-0"),
    ],
)
def test_a_request_is_moved_from_where_it_is_and_not_from_where_it_arrives(loads, owner):
    assert owner_of("r", loads) == owner


def test_a_request_that_arrives_somewhere_but_is_nowhere_is_not_found():
    with pytest.raises(NotFound):
        owner_of("r", listed(decode_0="offered"))
