"""Guided output: which tokens may come next under a JSON schema, a regex or a list of choices.

The state of a constraint is a function of the output so far. What is cached here only saves the
work of deriving it again, so a hand-off, a migration or a replay needs to carry nothing.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import llguidance
import numpy as np

from engine.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from engine.request import Grammar
    from engine.tokenizer import Tokenizer

FIELD = "response_format"
JSON_OPTIONS = {"whitespace_pattern": r"[ \t\n\r]{0,20}"}
"""White space is bounded: a weak model would otherwise indent for ever."""
GRAMMARS_KEPT = 64
MATCHERS_KEPT = 1024


class Matcher:
    """One request's place in its grammar."""

    def __init__(self, start: llguidance.LLMatcher) -> None:
        self._start = start
        self._matcher = start.deep_copy()
        self._consumed: list[int] = []

    def advance(self, output: Sequence[int]) -> None:
        """Moves to the place after `output`, from where it stands or from the beginning."""
        known = len(self._consumed)
        if list(output[:known]) != self._consumed:
            self._matcher, self._consumed, known = self._start.deep_copy(), [], 0
        for token in output[known:]:
            if not self.ended:
                self._matcher.consume_token(token)
            self._consumed.append(token)

    @property
    def ended(self) -> bool:
        """Nothing but the end may follow: the grammar is complete, or has failed."""
        return bool(self._matcher.is_stopped())

    @property
    def error(self) -> str:
        return str(self._matcher.get_error())

    def allowed(self) -> NDArray[np.bool_]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, bitorder="little").astype(np.bool_)


class GrammarCompiler:
    """Compiled grammars and running matchers, each kept up to a bound, the oldest use first out."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int | None = None,
        eos: frozenset[int] | None = None,
    ) -> None:
        """`vocab_size` is the width of the masks and `eos` what ends an answer, where the model's
        own differ from the tokenizer's."""
        self.vocab_size = vocab_size or tokenizer.vocab_size
        self.eos = tuple(sorted(tokenizer.eos_ids if eos is None else eos))
        self._tokenizer = llguidance.LLTokenizer(
            tokenizer.backend.to_str(),
            n_vocab=tokenizer.vocab_size,
            eos_token=list(self.eos) or None,
        )
        self._compiled: OrderedDict[Grammar, llguidance.LLMatcher] = OrderedDict()
        self._running: OrderedDict[tuple[str, Grammar], Matcher] = OrderedDict()

    def check(self, grammar: Grammar) -> None:
        """Raises BadRequest if the grammar cannot be compiled; for the edge to call."""
        self._compile(grammar)

    def matcher(self, request_id: str, grammar: Grammar, output: Sequence[int]) -> Matcher:
        """The request's matcher after the tokens of `output`."""
        key = (request_id, grammar)
        if key not in self._running:
            self._running[key] = Matcher(self._compile(grammar))
            _trim(self._running, MATCHERS_KEPT)
        self._running.move_to_end(key)
        found = self._running[key]
        found.advance(output)
        return found

    def allowed(self, matcher: Matcher) -> NDArray[np.bool_]:
        """Which tokens may come next; only the end if the grammar is complete."""
        mask = np.zeros(self.vocab_size, dtype=np.bool_)
        if matcher.ended:
            mask[list(self.eos)] = True
            return mask
        known = matcher.allowed()[: self.vocab_size]
        mask[: len(known)] = known
        return mask

    def _compile(self, grammar: Grammar) -> llguidance.LLMatcher:
        if grammar not in self._compiled:
            self._compiled[grammar] = self._fresh(grammar)
            _trim(self._compiled, GRAMMARS_KEPT)
        self._compiled.move_to_end(grammar)
        return self._compiled[grammar]

    def _fresh(self, grammar: Grammar) -> llguidance.LLMatcher:
        matcher = llguidance.LLMatcher(self._tokenizer, source(grammar), log_level=0)
        if matcher.is_error():
            raise _bad(grammar, _first_lines(str(matcher.get_error())))
        return matcher


def _trim(kept: OrderedDict[Any, Any], limit: int) -> None:
    while len(kept) > limit:
        kept.popitem(last=False)


def source(grammar: Grammar) -> str:
    """The grammar in llguidance's own notation."""
    to_json = llguidance.LLMatcher.grammar_from_json_schema
    to_regex = llguidance.LLMatcher.grammar_from_regex
    try:
        match grammar.kind:
            case "json_object":
                return str(to_json({"type": "object"}, overrides=JSON_OPTIONS))
            case "json_schema":
                return str(to_json(grammar.text, overrides=JSON_OPTIONS))
            case "regex":
                return str(to_regex(grammar.text))
            case "choice":
                return str(to_regex(_any_of(grammar)))
    except ValueError as error:
        raise _bad(grammar, str(error)) from error
    rule = "kind must be json_object, json_schema, regex or choice"
    raise BadRequest(FIELD, grammar.kind, rule)


def _any_of(grammar: Grammar) -> str:
    choices = json.loads(grammar.text)
    if not choices or not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise _bad(grammar, "choice must be a JSON array of one or more strings")
    return "|".join("".join(map(_literal, choice)) for choice in choices)


def _literal(character: str) -> str:
    """A character that a regex takes as itself."""
    plain = character.isalnum() or ord(character) > 0x7F
    return character if plain else f"\\x{{{ord(character):X}}}"


def _first_lines(message: str) -> str:
    """llguidance's message without the dump of its state."""
    return " ".join(message.split("<state>", maxsplit=1)[0].split())


def _bad(grammar: Grammar, rule: str) -> BadRequest:
    shown = grammar.text if len(grammar.text) <= 200 else grammar.text[:200] + "..."
    return BadRequest(FIELD, shown, rule)
