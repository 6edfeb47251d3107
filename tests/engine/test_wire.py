import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import messages, wire
from engine.batch import Logprobs
from engine.errors import BadMessage
from engine.layout import KvLayout
from engine.request import FinishReason, Grammar, Request, Sampling

REQUEST = Request(
    "r1", (1, 2, 3), Sampling(seed=7, grammar=Grammar("regex", "a+"), logit_bias=((5, -1.0),))
)
LAYOUT = KvLayout("m", 4, 2, 16, 8, "float32")
EXAMPLES = [
    messages.Start(REQUEST, 1, (9,), "decode-0", 2),
    messages.Start(REQUEST, 3),
    messages.Tokens(
        (
            messages.Token("r1", 1, 0, 42, None, Logprobs(-0.5, ((42, -0.5),))),
            messages.Token("r1", 1, 1, 43, FinishReason.STOP, None, (("finished_s", 2.0),)),
        )
    ),
    messages.Offer("t", messages.TransferKind.HANDOFF, REQUEST, 2, "g", LAYOUT, 9),
    messages.Migrated("r1", "a", "b", "drain", "committed", 0.01, 0.2, 1024),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_a_message_survives_the_wire(message):
    assert wire.decode(wire.encode(message)) == message


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_every_truncation_is_a_bad_message(message):
    data = wire.encode(message)
    for length in range(len(data)):
        with pytest.raises(BadMessage):
            wire.decode(data[:length])


@given(st.binary(max_size=64))
def test_noise_is_a_bad_message(data):
    with pytest.raises(BadMessage):
        wire.decode(data)


def test_a_field_of_the_wrong_type_is_a_bad_message():
    with pytest.raises(BadMessage, match="expected int"):
        wire.decode(wire.msgpack.packb(["Abort", ["r1", "one"]]))
