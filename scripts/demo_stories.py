"""Short stories from a small grammar: a hero, a friend, a place, a thing, and what happened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random import Random

TEXT = Path(__file__).parent / "demo_text"


def tables(name: str) -> dict[str, list[str]]:
    """The lines under each [heading] of a text file."""
    found: dict[str, list[str]] = {}
    for line in (TEXT / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            lines = found.setdefault(line.strip("[]"), [])
        elif line:
            lines.append(line)
    return found


WORDS = tables("words.txt")
LINES = tables("stories.txt")
PLOTS = [heading for heading in LINES if heading.startswith("plot ")]


@dataclass(frozen=True)
class Someone:
    name: str
    kind: str
    trait: str
    girl: bool

    @property
    def words(self) -> tuple[str, str, str]:
        return ("she", "her", "her") if self.girl else ("he", "him", "his")


def article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def someone(rng: Random) -> Someone:
    """One to tell of: an animal more often than not."""
    animal = rng.random() < 0.85
    return _drawn(rng, 0, WORDS["animals"] if animal else WORDS["people"])


def friend(rng: Random) -> Someone:
    """One whom the hero meets. No friend has a hero's name, so that who is who stays plain."""
    return _drawn(rng, 1, WORDS["people"])


def _drawn(rng: Random, parity: int, kinds: list[str]) -> Someone:
    girl = rng.random() < 0.5
    name = rng.choice(WORDS["girls" if girl else "boys"][parity::2])
    return Someone(name, rng.choice(kinds), rng.choice(WORDS["traits"]), girl)


def _slots(rng: Random, hero: Someone, met: Someone) -> dict[str, str]:
    place, (place2, place3) = rng.choice(WORDS["places"]), rng.sample(WORDS["places away"], 2)
    he, him, his = hero.words
    picks = {
        "n": hero.name, "kind": hero.kind, "trait": hero.trait, "he": he, "him": him, "his": his,
        "He": he.capitalize(), "himself": f"{him}self",
        "f": met.name, "fkind": met.kind, "ftrait": met.trait,
        "place": place, "place2": place2, "place3": place3,
        "thing": rng.choice(WORDS["things"]), "food": rng.choice(WORDS["foods"]),
        "weather": rng.choice(WORDS["weathers"]), "time": rng.choice(WORDS["times"]),
        "colour": rng.choice(WORDS["colours"]),
        "good": rng.choice(WORDS["good"]), "bad": rng.choice(WORDS["bad"]),
        "small": rng.choice(["two", "three", "four", "five"]),
    }  # fmt: skip
    with_article = ("kind", "trait", "ftrait", "weather", "thing", "colour")
    return picks | {f"a_{slot}": article(picks[slot]) for slot in with_article}


def _events(rng: Random, plot: str) -> list[str]:
    events = [rng.choice(LINES["mornings"])]
    events += [rng.choice(beat.split("|")) for beat in LINES[plot]]
    return [*events, rng.choice(LINES["endings"])]


def _paragraphs(rng: Random, sentences: list[str]) -> str:
    breaks = rng.sample(range(1, len(sentences)), rng.choice([0, 1, 2]))
    text = sentences[0]
    for i, sentence in enumerate(sentences[1:], 1):
        text += ("\n\n" if i in breaks else " ") + sentence
    return text


def story(rng: Random, hero: Someone | None = None) -> str:
    """A whole story in one to three paragraphs; the hero is drawn when not given."""
    hero = hero or someone(rng)
    slots = _slots(rng, hero, friend(rng))
    sentences = [rng.choice(LINES["openings"]), *_events(rng, rng.choice(PLOTS))]
    return _paragraphs(rng, sentences).format(**slots)


def long_story(rng: Random, hero: Someone) -> str:
    """A story in two to four chapters, with a new friend in each."""
    chapters = []
    for number, plot in enumerate(rng.sample(PLOTS, rng.randint(2, 4)), 1):
        slots = _slots(rng, hero, friend(rng))
        opening = [rng.choice(LINES["openings"])] if number == 1 else []
        text = _paragraphs(rng, opening + _events(rng, plot)).format(**slots)
        chapters.append(f"Chapter {number}\n\n{text}")
    return "\n\n".join(chapters)
