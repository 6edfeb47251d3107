"""Guided output stays inside its grammar and its state follows from the output alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine import grammar as grammar_module
from engine.batch import Draw
from engine.errors import BadRequest
from engine.grammar import GrammarCompiler
from engine.request import Grammar, Sampling
from engine.sampler import Sampler
from engine.tokenizer import Tokenizer

DEMO = Path(grammar_module.__file__).parent / "demo"
TOKENIZER = Tokenizer.open(DEMO)
EOS = TOKENIZER.eos_id or 0
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMA = Grammar("json_schema", json.dumps(PERSON))
DATE = Grammar("regex", r"\d{4}-\d{2}-\d{2}/[a-c]+")
CHOICE = Grammar("choice", json.dumps(["red", "dark green", "a.b*c|(d)", "größe"]))
OBJECT = Grammar("json_object", "")


def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER)


def answer(grammar: Grammar, seed: int, compiler: GrammarCompiler, tokens: int = 150) -> list[int]:
    """What a sampler writes under the grammar from random logits."""
    generator = torch.Generator().manual_seed(seed)
    sampler = Sampler(TOKENIZER.vocab_size, compiler, TOKENIZER.eos_ids)
    sampling = Sampling(seed=seed, grammar=grammar)
    output: list[int] = []
    while len(output) < tokens and EOS not in output:
        logits = torch.randn(1, TOKENIZER.vocab_size, generator=generator)
        logits[0, EOS] += 6
        draw = Draw(sampling, len(output), 2, (5, 6, *output))
        output.append(sampler.sample(logits, [draw], ["r"])[0].token)
    return output


@pytest.mark.parametrize("seed", range(8))
def test_random_logits_write_an_object_of_the_schema(seed: int) -> None:
    output = answer(SCHEMA, seed, compiler())
    if EOS in output:
        person = json.loads(TOKENIZER.decode(output))
        assert set(person) == {"name", "age"}
        assert isinstance(person["age"], int)


def test_random_logits_write_what_the_regex_matches() -> None:
    output = answer(DATE, 3, compiler())
    assert re.fullmatch(DATE.text, TOKENIZER.decode(output))


@pytest.mark.parametrize("seed", range(6))
def test_random_logits_write_one_of_the_choices_and_then_end(seed: int) -> None:
    output = answer(CHOICE, seed, compiler())
    assert TOKENIZER.decode(output) in json.loads(CHOICE.text)
    assert output[-1] == EOS


@pytest.mark.parametrize("text", ["{}", '{"a": [1, {"b": null}]}', '{\n    "a": "x"\n}'])
def test_a_json_object_may_be_any_object(text: str) -> None:
    matcher = compiler().matcher("r", OBJECT, TOKENIZER.encode(text, add_special_tokens=False))
    assert matcher.error == ""
    assert matcher.allowed()[EOS]


def test_a_json_object_is_not_an_array() -> None:
    rules = compiler()
    (bracket,) = TOKENIZER.encode("[", add_special_tokens=False)
    assert not rules.allowed(rules.matcher("r", OBJECT, []))[bracket]


def test_only_the_end_may_follow_a_complete_answer() -> None:
    rules = compiler()
    red = TOKENIZER.encode("red", add_special_tokens=False)
    for output in (red, [*red, EOS], [*red, EOS, EOS]):
        allowed = rules.allowed(rules.matcher("r", CHOICE, output))
        assert allowed.nonzero()[0].tolist() == [EOS]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=12))
def test_any_order_of_asking_gives_the_masks_of_the_output_alone(lengths: list[int]) -> None:
    """Rolling forward, going back after a replay, and starting afresh agree."""
    text = '{"name": "Mia", "age": 31}'
    output = TOKENIZER.encode(text, add_special_tokens=False)
    for length in lengths:
        part = output[: length % (len(output) + 1)]
        cached = CACHED.allowed(CACHED.matcher("r", SCHEMA, part))
        fresh = FRESH.allowed(FRESH.matcher(f"fresh{len(part)}", SCHEMA, part))
        assert cached.tolist() == fresh.tolist()


CACHED, FRESH = compiler(), compiler()


def test_a_request_that_comes_back_with_another_output_is_matched_anew() -> None:
    rules = compiler()
    rules.matcher("r", CHOICE, TOKENIZER.encode("red", add_special_tokens=False))
    other = TOKENIZER.encode("dark green", add_special_tokens=False)
    assert rules.matcher("r", CHOICE, other).ended


def test_caches_keep_to_their_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "MATCHERS_KEPT", 3)
    monkeypatch.setattr(grammar_module, "GRAMMARS_KEPT", 2)
    rules = compiler()
    for i in range(10):
        rules.matcher(f"r{i}", Grammar("regex", f"a{{{i + 1}}}"), [])
    assert len(rules._running) == 3
    assert len(rules._compiled) == 2


@pytest.mark.parametrize(
    ("grammar", "rule"),
    [
        (Grammar("json_schema", '{"type": "objec"}'), "objec"),
        (Grammar("json_schema", '{"type": '), "EOF"),
        (Grammar("json_schema", "[]"), "Expecting object schema"),
        (Grammar("json_schema", '{"not": {}}'), "Unimplemented"),
        (Grammar("regex", "(a|b"), "unclosed group"),
        (Grammar("regex", "(?=a)b"), "look-around"),
        (Grammar("choice", "[]"), "one or more strings"),
        (Grammar("choice", "[1]"), "one or more strings"),
        (Grammar("choice", "red"), "Expecting value"),
        (Grammar("haiku", ""), "kind must be"),
    ],
)
def test_a_bad_grammar_is_refused_at_the_edge(grammar: Grammar, rule: str) -> None:
    with pytest.raises(BadRequest, match="response_format") as refused:
        compiler().check(grammar)
    assert rule in refused.value.rule
    assert "<state>" not in refused.value.rule


def test_good_grammars_pass_the_check() -> None:
    rules = compiler()
    for grammar in (SCHEMA, DATE, CHOICE, OBJECT):
        rules.check(grammar)


def test_min_tokens_yields_to_a_grammar_that_can_only_end() -> None:
    sampler = Sampler(TOKENIZER.vocab_size, compiler(), TOKENIZER.eos_ids)
    sampling = Sampling(temperature=0.0, grammar=CHOICE, min_tokens=50)
    red = TOKENIZER.encode("red", add_special_tokens=False)
    draw = Draw(sampling, len(red), 0, tuple(red))
    logits = torch.zeros(1, TOKENIZER.vocab_size)
    assert sampler.sample(logits, [draw], ["r"])[0].token == EOS


def test_guided_and_free_rows_share_a_batch() -> None:
    logits = torch.zeros(2, TOKENIZER.vocab_size)
    logits[:, EOS] = 9.0
    samplings = [Sampling(temperature=0.0, grammar=CHOICE), Sampling(temperature=0.0)]
    draws = [Draw(sampling, 0, 0, ()) for sampling in samplings]
    sampler = Sampler(TOKENIZER.vocab_size, compiler(), TOKENIZER.eos_ids)
    guided, free = sampler.sample(logits, draws, ["g", "f"])
    assert free.token == EOS
    assert any(
        choice.encode().startswith(TOKENIZER.token_bytes(guided.token))
        for choice in json.loads(CHOICE.text)
    )


def test_an_answer_ends_with_the_models_own_end_where_it_has_one() -> None:
    rules = GrammarCompiler(TOKENIZER, eos=frozenset({3}))
    red = TOKENIZER.encode("red", add_special_tokens=False)
    assert rules.allowed(rules.matcher("r", CHOICE, red)).nonzero()[0].tolist() == [3]
    begun = rules.allowed(rules.matcher("s", DATE, []))
    assert not begun[EOS]


def test_masks_are_as_wide_as_the_model() -> None:
    wide = GrammarCompiler(TOKENIZER, vocab_size=TOKENIZER.vocab_size + 100)
    allowed = wide.allowed(wide.matcher("r", SCHEMA, []))
    assert len(allowed) == TOKENIZER.vocab_size + 100
    assert not allowed[TOKENIZER.vocab_size :].any()
