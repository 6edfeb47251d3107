"""A request that cannot be served is answered with its field, its value and the rule."""

import pytest

from cluster.gateway.call import Call, RequestLimits
from cluster.gateway.settings import GatewaySettings
from engine.errors import BadRequest, PromptTooLong
from engine.request import Sampling
from tests.cluster.serving import running


@pytest.mark.parametrize(
    ("bad", "field", "value", "rule"),
    [
        (
            Call(prompts=("hello",), max_tokens=8, sampling=Sampling(temperature=-0.5)),
            "temperature",
            -0.5,
            "between 0",
        ),
        (Call(prompts=("x" * 3000,), max_tokens=8), "prompt", 3000, "this model's context is"),
    ],
    ids=["a negative temperature", "a prompt over the model's length"],
)
async def test_what_no_model_could_serve_is_refused(bad, field, value, rule):
    async with running("mixed-0") as cluster:
        with pytest.raises(BadRequest) as refused:
            await cluster.gateway.open(bad)
        assert (refused.value.field, refused.value.value) == (field, value)
        assert rule in refused.value.rule
        cluster.assert_empty()


async def test_a_cache_too_small_for_one_prompt_tells_what_would_be_needed():
    async with running("mixed-0") as cluster:
        (instance,) = cluster.instances.values()
        instance.total_blocks = 2
        cluster.gateway.receive(instance.name, instance.load())
        with pytest.raises(PromptTooLong) as refused:
            await cluster.gateway.open(Call(prompts=("x" * 100,), max_tokens=8))
        assert refused.value.value == 100
        assert "the largest pool here has 2" in refused.value.rule
        cluster.assert_empty()


@pytest.mark.parametrize(
    ("long", "field"),
    [
        (Call(prompts=("x" * 101,)), "prompt"),
        (Call(chat=({"role": "user", "content": "x" * 100},)), "messages"),
    ],
    ids=["a prompt", "a conversation"],
)
async def test_no_text_is_longer_than_the_limit_says(long, field):
    limits = RequestLimits(prompt_characters=100)
    async with running("mixed-0", settings=GatewaySettings(limits)) as cluster:
        with pytest.raises(BadRequest, match="at most 100 characters") as refused:
            await cluster.gateway.open(long)
        assert refused.value.field == field
        cluster.assert_empty()
