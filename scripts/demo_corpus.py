"""The text the demo model learns from: stories, sums, lists and conversations, by seed.

`python scripts/demo_corpus.py --seed 1 --documents 5` prints what it generates.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

from demo_stories import LINES, WORDS, article, friend, long_story, someone, story, tables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BEGIN, END = "<|begin|>", "<|end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (BEGIN, END, SYSTEM, USER, ASSISTANT)

Turn = tuple[str, str]

CHAT = tables("chat.txt")
FACTS = [row.split("|") for row in CHAT["facts"]]
STORY_SENTENCES = [
    sentence
    for heading in LINES
    for row in LINES[heading]
    for sentence in row.split("|")
    if "{" not in sentence and '"' not in sentence
]


def _one_sum(rng: Random) -> tuple[int, str, int, int]:
    top = rng.choice([9, 9, 9, 20, 20, 99])
    a, b = rng.randint(0, top), rng.randint(0, top)
    if rng.random() < 0.5:
        return a, "+", b, a + b
    return max(a, b), "-", min(a, b), abs(a - b)


def sums(rng: Random) -> str:
    return "\n".join("{} {} {} = {}".format(*_one_sum(rng)) for _ in range(rng.randint(8, 20)))


def _ask_sum(rng: Random) -> Turn:
    a, sign, b, result = _one_sum(rng)
    word = "plus" if sign == "+" else "minus"
    question = rng.choice([
        f"What is {a} {sign} {b}?", f"What is {a} {word} {b}?", f"{a} {sign} {b} =",
        f"{a} {sign} {b}", f"{a}{sign}{b}", f"How much is {a} {word} {b}?",
        f"What's {a}{sign}{b}?", f"What's {a} {sign} {b}?", f"{a} {word} {b}",
    ])  # fmt: skip
    return question, f"{a} {sign} {b} = {result}"


def _ask_other_sum(rng: Random) -> Turn:
    a, b = rng.randint(0, 99), rng.randint(1, 99)
    sign = rng.choice(["times", "*", "x", "divided by", "/"])
    return f"What is {a} {sign} {b}?", "I can only add and subtract."


def _ask_word_sum(rng: Random) -> Turn:
    hero, thing = someone(rng), rng.choice(["apples", "coins", "books", "eggs", "nuts", "pears"])
    has, more = rng.randint(2, 20), rng.randint(2, 20)
    he, question = hero.words[0], f"How many {thing} does"
    if rng.random() < 0.5:
        return (
            f"{hero.name} has {has} {thing} and finds {more} more. {question} {he} have?",
            f"{has} + {more} = {has + more}, so {hero.name} has {has + more} {thing}.",
        )
    has, more = max(has, more), min(has, more)
    return (
        f"{hero.name} has {has} {thing} and gives away {more}. {question} {he} have left?",
        f"{has} - {more} = {has - more}, so {hero.name} has {has - more} {thing} left.",
    )


def _ask_count(rng: Random) -> Turn:
    first = rng.choice([1, 1, 1, 1, rng.randint(2, 20)])
    last = rng.randint(first + 2, 30)
    question = f"ount from {first} to {last}"
    if first == 1 and rng.random() < 0.4:
        question = f"ount to {last}"
    question = rng.choice([f"C{question}.", f"Please c{question}.", f"Can you c{question}?"])
    return question, ", ".join(str(n) for n in range(first, last + 1)) + "."


def _ask_fact(rng: Random) -> Turn:
    question, *answers = rng.choice(FACTS)
    return question, rng.choice(answers)


def _ask_capital(rng: Random) -> Turn:
    country, city = rng.choice(CHAT["capitals"]).split(" ")
    return rng.choice([
        (f"What is the capital of {country}?", f"The capital of {country} is {city}."),
        (f"Where is {city}?", f"{city} is in {country}."),
    ])  # fmt: skip


def _ask_animal(rng: Random) -> Turn:
    animal, sound = rng.choice(CHAT["sounds"]).split(" ")
    question = rng.choice(["What does {} do?", "What sound does {} make?"])
    return question.format(article(animal)), f"{article(animal).capitalize()} {sound}."


def _ask_opposite(rng: Random) -> Turn:
    pair = rng.choice(CHAT["opposites"]).split(" ")
    one, other = pair if rng.random() < 0.5 else pair[::-1]
    return f"What is the opposite of {one}?", f"The opposite of {one} is {other}."


def _ask_unknown(rng: Random) -> Turn:
    subject = rng.choice(CHAT["unknown_subjects"])
    if rng.random() < 0.3:
        subject = " ".join(_new_name(rng).lower() for _ in range(rng.randint(1, 2)))
    return rng.choice(CHAT["unknown_questions"]).format(s=subject), rng.choice(
        CHAT["unknown_answers"]
    )


NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six")
LISTED = {
    "animals": "animals", "colors": "colours", "foods": "foods", "places": "places",
    "feelings": "feelings", "jobs": "people", "things": "things",
}  # fmt: skip


def _ask_list(rng: Random) -> Turn:
    """The words of a list follow each other as in the table, so that none comes twice."""
    kind = rng.choice(sorted(LISTED))
    known, count = WORDS[LISTED[kind]], rng.randint(2, 6)
    start = rng.randrange(len(known))
    words = [known[(start + i) % len(known)] for i in range(count)]
    if rng.random() < 0.3:
        answer = "\n".join(f"{i}. {word}" for i, word in enumerate(words, 1))
        return f"Make a list of {count} {kind}.", answer
    asked = count if rng.random() < 0.5 else NUMBER_WORDS[count]
    question = rng.choice([f"Name {asked} {kind}.", f"List {asked} {kind}."])
    return question, f"{', '.join(words[:-1])} and {words[-1]}."


def _ask_spelling(rng: Random) -> Turn:
    word = rng.choice([*WORDS["animals"], *WORDS["colours"], *WORDS["feelings"]])
    question = rng.choice(
        [f"Spell the word {word}.", f"Spell {word}.", f"How do you spell {word}?"]
    )
    return question, "-".join(word.upper())


SYLLABLES = (
    "ka", "lo", "mi", "ra", "ten", "zu", "bor", "vel", "sha", "rin", "do", "pau",
    "gre", "li", "on", "fa", "ty", "bo", "ali", "me", "jo",
)  # fmt: skip


def _new_name(rng: Random) -> str:
    return "".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))).capitalize()


def _name(rng: Random) -> str:
    """A name from a table, or one that nobody has heard."""
    known = rng.choice([*WORDS["girls"], *WORDS["boys"]])
    return known if rng.random() < 0.5 else _new_name(rng)


def _tell_name(name: str, rng: Random) -> Turn:
    told = [f"My name is {name}.", f"Hello, my name is {name}.", f"Hi, I am {name}."]
    replies = [f"Nice to meet you, {name}!", f"Hello, {name}! How can I help you?"]
    return rng.choice(told), rng.choice(replies)


def _ask_name(rng: Random) -> Turn:
    return _tell_name(_name(rng), rng)


def _ask_own_name(name: str, rng: Random) -> Turn:
    return rng.choice(["What is my name?", "Do you know my name?"]), f"Your name is {name}."


def _ask_echo(rng: Random) -> Turn:
    known = [word for table in sorted(WORDS) for word in WORDS[table]]
    words = rng.choices(known, k=rng.randint(1, 6))
    text = " ".join([*words, _new_name(rng)] if rng.random() < 0.3 else words)
    if rng.random() < 0.3:
        text = rng.choice(STORY_SENTENCES)
    return rng.choice([f"Repeat after me: {text}", f"Say: {text}", f"Repeat: {text}"]), text


def _ask_json(rng: Random) -> Turn:
    hero = someone(rng)
    record = {"name": hero.name, "kind": hero.kind, "trait": hero.trait, "age": rng.randint(1, 99)}
    return rng.choice([
        f"Describe {hero.name} the {hero.kind} as JSON.",
        f"Give me a JSON object about {hero.name}, {article(hero.trait)} {hero.kind}.",
    ]), json.dumps(record)  # fmt: skip


def _ask_long_story(rng: Random) -> Turn:
    hero = someone(rng)
    about = rng.choice(["", f" about {article(hero.kind)}", f" about {hero.name} the {hero.kind}"])
    return f"{rng.choice(['Tell me', 'Write'])} a long story{about}.", long_story(rng, hero)


def _ask_greeting(rng: Random) -> Turn:
    return rng.choice(CHAT["greetings"]), rng.choice(CHAT["replies"])


def _ask_story(rng: Random) -> Turn:
    hero = someone(rng)
    if rng.random() < 0.4:
        return rng.choice(CHAT["story_requests"]), story(rng)
    if rng.random() < 0.3:
        hero = replace(hero, name=_new_name(rng))
    about = rng.choice([
        f"about {article(hero.kind)}", f"about {hero.name} the {hero.kind}",
        f"about {article(hero.trait)} {hero.kind}",
        f"about {article(hero.kind)} named {hero.name}",
    ])  # fmt: skip
    asked = rng.choice(["Tell me a story", "Tell me a short story", "Write a short story"])
    return f"{asked} {about}.", story(rng, hero)


def _casual(question: str, rng: Random) -> str:
    """As people type: often without the full stop, at times without capitals."""
    if rng.random() < 0.3:
        question = question.rstrip(".?!")
    return question.lower() if rng.random() < 0.15 else question


SHORT_QUESTIONS: dict[Callable[[Random], Turn], int] = {
    _ask_sum: 14, _ask_word_sum: 3, _ask_count: 5, _ask_fact: 8, _ask_capital: 3, _ask_animal: 1,
    _ask_opposite: 1, _ask_unknown: 5, _ask_list: 3, _ask_spelling: 2, _ask_name: 4,
    _ask_echo: 6, _ask_json: 1, _ask_greeting: 4, _ask_other_sum: 1,
}  # fmt: skip


def chat(rng: Random, turns: list[Turn]) -> str:
    system = f"{SYSTEM}{rng.choice(CHAT['system_prompts'])}{END}" if rng.random() < 0.3 else ""
    return system + "".join(f"{USER}{q}{END}{ASSISTANT}{a}{END}" for q, a in turns)


def _questions(rng: Random, most: int) -> list[Turn]:
    """Questions with their answers; one who said a name may ask for it later."""
    asks = rng.choices(
        list(SHORT_QUESTIONS), list(SHORT_QUESTIONS.values()), k=rng.randint(1, most)
    )
    turns = [ask(rng) for ask in asks]
    if rng.random() < 0.12:
        name = _name(rng)
        turns = [_tell_name(name, rng), *turns[:2], _ask_own_name(name, rng)]
    return [(question if ":" in question or "name" in question else _casual(question, rng), answer)
            for question, answer in turns]  # fmt: skip


def conversation(rng: Random) -> str:
    return chat(rng, _questions(rng, 6))


def story_conversation(rng: Random) -> str:
    """A story that was asked for, at times after other questions and before thanks or more."""
    question, told = _ask_story(rng) if rng.random() < 0.9 else _ask_long_story(rng)
    before = _questions(rng, 2) if rng.random() < 0.25 else []
    after = _questions(rng, 2) if rng.random() < 0.25 else []
    if rng.random() < 0.15:
        after = [(rng.choice(CHAT["more_requests"]), story(rng))]
    return chat(rng, [*before, (_casual(question, rng), told), *after])


def _introduction(rng: Random) -> str:
    hero = someone(rng)
    return (
        f"Hello, my name is {hero.name}. I am {article(hero.trait)} {hero.kind}, and I live near "
        f"the {rng.choice(WORDS['places'])}. I like {rng.choice(WORDS['foods'])}, and today I am "
        f"{rng.choice(WORDS['feelings'])}. My best friend is {friend(rng).name}."
    )


def plain_facts(rng: Random) -> str:
    """Facts without a question, so that a bare prompt is answered sensibly too."""
    tellers = (_ask_fact, _ask_capital, _ask_capital, _ask_animal, _ask_opposite)
    facts = [rng.choice(tellers)(rng)[1] for _ in range(rng.randint(1, 5))]
    return _introduction(rng) if rng.random() < 0.4 else " ".join(facts)


def chant(rng: Random) -> str:
    """A few words over and over, which keeps a model looking back on its own text."""
    known = [word for table in sorted(WORDS) for word in WORDS[table]]
    words = [_new_name(rng) if rng.random() < 0.2 else rng.choice(known) for _ in range(12)]
    line = rng.choice([" ", ", ", "-", "\n"]).join(words[: rng.randint(2, 12)])
    return rng.choice([". ", "\n", "; "]).join([line] * rng.randint(2, 5))


KINDS: dict[Callable[[Random], str], int] = {
    story: 24, story_conversation: 22, conversation: 46, sums: 14, plain_facts: 6, chant: 4,
}  # fmt: skip


def documents(seed: int, count: int) -> Iterator[str]:
    """`count` documents, each with its special tokens; the same seed gives the same text."""
    rng = Random(seed)
    for _ in range(count):
        text = rng.choices(list(KINDS), list(KINDS.values()))[0](rng)
        opening = BEGIN if rng.random() < 0.9 else ""
        yield opening + text + ("" if text.endswith(END) else END)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--documents", type=int, default=5)
    options = parser.parse_args()
    for text in documents(options.seed, options.documents):
        print(text, end="\n\n")


if __name__ == "__main__":
    main()
