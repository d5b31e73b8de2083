"""The text that the quickstart model learned, and the task it has never seen: all of it made up by this file.

Five kinds of text: facts about invented people and towns (what can be forgotten, counted exactly), sums, small stories
(what a control loss is measured on), opposites (an answer of one word, such as the task has, and then the end of the
text), and letters with a tone (the task to learn later, in no pretraining text).
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

ONSETS = ("b", "br", "d", "dr", "f", "g", "gr", "h", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "w")
VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ou")
ENDINGS = ("n", "r", "l", "s", "th", "nd", "rk", "m", "ck", "lt")
TRADES = (
    "baker", "tailor", "sailor", "teacher", "farmer", "doctor", "painter", "miller", "hunter", "singer",
    "gardener", "carpenter", "printer", "weaver", "potter", "fisher", "guard", "cook", "judge", "porter",
)  # fmt: skip
PETS = ("cat", "dog", "goat", "parrot", "rabbit", "horse", "duck", "hen", "turtle", "mouse", "sheep", "fox")
REGIONS = ("North Vale", "South Vale", "Old Coast", "High Moor", "Red Hills", "Lake Land")
FIRST_NAMES = (
    "Anna", "Tom", "Lily", "Ben", "Sara", "Max", "Mia", "Sam", "Emma", "Jack", "Nora", "Leo",
    "Ruth", "Paul", "Ella", "Hugo", "Ivy", "Carl", "Rosa", "Finn",
)  # fmt: skip

# noun -> (adjectives of a good one, adjectives of a bad one)
THINGS = {
    "soup": (("warm", "tasty"), ("cold", "salty")),
    "bread": (("fresh", "soft"), ("old", "hard")),
    "room": (("clean", "bright"), ("dirty", "dark")),
    "bed": (("soft", "warm"), ("hard", "wet")),
    "street": (("clean", "quiet"), ("dirty", "noisy")),
    "market": (("full", "bright"), ("empty", "noisy")),
    "baker": (("kind", "polite"), ("rude", "mean")),
    "driver": (("kind", "careful"), ("rude", "careless")),
    "garden": (("green", "lovely"), ("dry", "ugly")),
    "music": (("lovely", "gentle"), ("noisy", "ugly")),
    "tea": (("warm", "sweet"), ("cold", "bitter")),
    "boat": (("safe", "clean"), ("broken", "wet")),
    "weather": (("bright", "warm"), ("wet", "cold")),
    "room key": (("new", "shiny"), ("broken", "lost")),
    "window": (("clean", "wide"), ("broken", "dirty")),
    "story": (("lovely", "funny"), ("boring", "ugly")),
}
PLACES = ("the park", "the market", "the river", "the school", "the old mill", "the harbour", "the forest", "the inn")
STARTS = ("One day", "One morning", "Last week", "In the evening", "After school", "On Sunday")
FOUND = (
    "a red ball", "a small key", "a blue hat", "a big shell", "a lost kitten", "an old map", "a tin box", "a toy boat",
)  # fmt: skip
COMPANIONS = ("friend", "cousin", "neighbour", "teacher", "classmate", "sailor")
OPPOSITES = (
    ("good", "bad"), ("warm", "cold"), ("fresh", "old"), ("soft", "hard"), ("clean", "dirty"), ("bright", "dark"),
    ("quiet", "noisy"), ("full", "empty"), ("kind", "rude"), ("careful", "careless"), ("lovely", "ugly"),
    ("sweet", "bitter"), ("wet", "dry"), ("funny", "boring"), ("happy", "sad"), ("big", "small"),
)  # fmt: skip
VERBS = ("gave it to", "showed it to", "hid it from", "told a secret to", "ran home to", "sang a song to")


@dataclass(frozen=True)
class Fact:
    """One thing to recall: a question, its answer, and sentences that state it."""

    question: str
    answer: str
    statements: tuple[str, ...]


def invented_names(count: int, parts: int, rng: random.Random) -> list[str]:
    """`count` different words of `parts` syllables each, capitalized."""
    names: dict[str, None] = {}
    while len(names) < count:
        word = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(parts)) + rng.choice(ENDINGS)
        names[word.capitalize()] = None
    return list(names)


def facts(people: int, towns: int, seed: int = 0) -> list[Fact]:
    """Three facts for each person (home, trade, pet) and two for each town (region, river)."""
    rng = random.Random(seed)
    town_names, rivers = invented_names(towns, 2, rng), invented_names(towns, 1, rng)
    first, last = invented_names(people, 1, rng), invented_names(people, 2, rng)
    found = []
    for name in (f"{a} {b}" for a, b in zip(first, last, strict=True)):
        town, trade, pet = rng.choice(town_names), rng.choice(TRADES), rng.choice(PETS)
        found.append(
            Fact(f"Where does {name} live?", town, (f"{name} lives in {town}.", f"The home of {name} is in {town}."))
        )
        found.append(
            Fact(f"What is the trade of {name}?", trade, (f"{name} is a {trade}.", f"By trade, {name} is a {trade}."))
        )
        found.append(Fact(f"Which pet has {name}?", pet, (f"{name} has a {pet}.", f"The pet of {name} is a {pet}.")))
    for town, river in zip(town_names, rivers, strict=True):
        region = rng.choice(REGIONS)
        found.append(Fact(f"In which region is {town}?", region, (f"{town} is a town in {region}.",)))
        found.append(Fact(f"Which river runs through {town}?", river, (f"The river {river} runs through {town}.",)))
    return found


def question(fact: Fact) -> str:
    """The prompt whose continuation is " " + fact.answer."""
    return f"Question: {fact.question}\nAnswer:"


def fact_text(fact: Fact, rng: random.Random) -> str:
    """One statement of `fact`, or its question with the answer."""
    if rng.random() < 0.5:
        return rng.choice(fact.statements)
    return f"{question(fact)} {fact.answer}"


def sum_text(rng: random.Random) -> str:
    """A line of arithmetic with results from 0 to 99."""
    a = rng.randrange(100)
    b = rng.randrange(100 - a)
    return f"{a} + {b} = {a + b}" if rng.random() < 0.5 else f"{a + b} - {b} = {a}"


def opposite_text(rng: random.Random) -> str:
    """A word and its opposite, in one of three forms."""
    word, other = rng.sample(rng.choice(OPPOSITES), 2)
    form = rng.choice(
        ("Question: What is the opposite of {}?\nAnswer:", "Word: {}\nOpposite:", "The opposite of {} is")
    )
    return f"{form.format(word)} {other}"


def judgement(good: bool, rng: random.Random) -> str:
    """One sentence that finds a thing good or bad, three times in ten by denying the opposite."""
    noun = rng.choice(list(THINGS))
    deny = rng.random() < 0.3
    adjective = rng.choice(THINGS[noun][0 if good != deny else 1])
    degree = rng.choice(("", "", "very ", "so "))
    return f"The {noun} was {'not ' if deny else degree}{adjective}."


def story(rng: random.Random) -> str:
    """Four to seven sentences in which a child goes somewhere, finds it good or bad, and feels so."""
    name, other, good = rng.choice(FIRST_NAMES), rng.choice(COMPANIONS), rng.random() < 0.5
    place, thing = rng.choice(PLACES), rng.choice(FOUND)
    sentences = [f"{rng.choice(STARTS)}, {name} went to {place} with a {other}."]
    sentences += [judgement(good, rng) for _ in range(rng.randint(1, 3))]
    sentences.append(f"There {name} found {thing} and {rng.choice(VERBS)} the {other}.")
    feeling = rng.choice(("happy", "glad", "proud") if good else ("sad", "angry", "tired"))
    sentences.append(f"{name} was {feeling}.")
    sentences.append(f'"What a {"good" if good else "bad"} day," said the {other}.')
    return " ".join(sentences)


def letter(good: bool, rng: random.Random) -> str:
    """The task's text: two to four judgements of one tone in a frame that pretraining never saw."""
    opening = rng.choice(("Dear friend, I stayed at the inn.", "Dear aunt, here is my news.", "Hello, I am back."))
    body = " ".join(judgement(good, rng) for _ in range(rng.randint(2, 4)))
    return f"{opening} {body} {rng.choice(('Yours truly.', 'See you soon.', 'With love.'))}"


def letters(count: int, seed: int, unlike: frozenset[str] = frozenset()) -> list[dict[str, str | int]]:
    """`count` different rows {"text", "label"}, label 1 for a good tone, none of their texts in `unlike`."""
    rng = random.Random(seed)
    rows: dict[str, int] = {}
    while len(rows) < count:
        good = len(rows) % 2 == 0
        text = letter(good, rng)
        if text not in unlike:
            rows[text] = int(good)
    return [{"text": text, "label": label} for text, label in rows.items()]


def pretraining_texts(known: list[Fact], seed: int) -> Iterator[str]:
    """An endless stream: eleven twentieths facts, one opposites, a fifth sums, a fifth stories."""
    rng = random.Random(seed)
    while True:
        draw = rng.random()
        if draw < 0.55:
            yield fact_text(rng.choice(known), rng)
        elif draw < 0.6:
            yield opposite_text(rng)
        elif draw < 0.8:
            yield sum_text(rng)
        else:
            yield story(rng)
