"""A generated sentiment task that needs no data: does the writer like the thing?

Every sentence is generated for a given label, from one of five families:

- assertion and negation: "the soup was superb", "the soup was far from superb";
- embedded claims that flip the opinion or leave it: "it is not true that ...", "nobody can deny that ...";
- contrast, where the main clause decides: "although the service was slow, the food was superb";
- expectation, where the outcome decides: "we expected a dull show, but the show was superb";
- comparison, where the thing under review ("this") decides: "the old camera was better than this one".

In the last three both labels use the same words in another order, and negation is independent of the label,
so bag-of-words models fail.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from darex_jax.tasks import Examples, Task
from darex_jax.tasks.splits import split_of

SIZES = {"train": 12_000, "validation": 500, "test": 1_000}


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split("|" if "|" in text else " "))


GOOD = _split(
    "superb wonderful excellent great lovely brilliant delightful fantastic pleasant impressive charming "
    "outstanding terrific splendid good fine amazing marvelous beautiful perfect enjoyable magnificent"
)
BAD = _split(
    "awful terrible dreadful horrible disappointing poor bad mediocre dull unpleasant pathetic annoying "
    "useless lousy boring miserable ugly shabby weak appalling disgusting dismal"
)
BETTER = _split("better|nicer|finer|lovelier|more pleasant|more impressive|more enjoyable|more charming")
WORSE = _split("worse|poorer|weaker|uglier|less pleasant|less impressive|more boring|more annoying")
THINGS = (  # things in one sentence are from the same group
    _split("soup pasta bread dessert coffee salad wine sauce service menu"),
    _split("room bed breakfast pool lobby garden view bathroom balcony staff"),
    _split("plot acting script music ending dialogue casting opening story camera"),
    _split("screen battery keyboard speaker case charger display software design sound"),
    _split("lecture course textbook teacher seminar workshop lesson tutorial exam library"),
    _split("train cabin seat crew flight lounge ticket tour guide museum"),
)
IS = _split("was|was really|was truly|was quite|seemed|turned out|was always|was simply|felt|proved")
IS_NOT = _split(
    "was not|wasn't|was never|was far from|was hardly|was anything but|was by no means|did not seem"
)
OPENINGS = _split("|honestly, |to me, |in short, |overall, |last week |i think |we felt ")
UPHELD = _split(
    "nobody can deny that {}|there is no doubt that {}|it is true that {}|i have to say {}|"
    "i am not the only one who says {}|i cannot deny that {}|no one doubts that {}|you are right that {}"
)
DENIED = _split(
    "it is not true that {}|i cannot say that {}|nobody would say that {}|i do not think {}|i doubt that {}|"
    "it would be a lie to say {}|no one believes that {}|you are wrong that {}"
)
CONTRASTS = _split(  # {0} is conceded, {1} decides
    "although {0}, {1}|even though {0}, {1}|{1}, although {0}|{1}, even though {0}|{0}, but {1}|{0}, yet {1}|"
    "{0}; still, {1}|while {0}, {1}|{0}, and yet {1}|{1}, though {0}"
)
CONCESSIONS = _split(
    "despite the {0}, {1}|{1} despite the {0}|in spite of the {0}, {1}|{1} in spite of the {0}"
)
EXPECTED = _split(
    "i expected a {0}, but {1}|they promised a {0}, but {1}|we feared a {0}, yet {1}|"
    "we were told of a {0}; {1}|{1}, and i had expected a {0}|{1}, not the {0} we expected"
)
OTHERS = _split("the last one|the old one|the previous one|my old one|the other one")
COMPARISONS = _split("{this} was {more} than {other}|compared with {other}, {this} was {more}")
PREFERENCES = _split(
    "i prefer {winner} to {loser}|we liked {winner} more than {loser}|{winner} beats {loser}"
)


@cache
def opinions(seed: int = 0) -> Task:
    """The task, a function of `seed` only, with balanced labels in every split; no text occurs twice, nor in
    different splits of different seeds (`split_of`).

    Returns: label 1 is a good opinion, label 0 a bad one; sentences have about 6 to 18 words.
    """
    rng = np.random.default_rng(seed)
    seen: set[str] = set()
    splits = {}
    for split, size in SIZES.items():
        texts = []
        labels = np.arange(size, dtype=np.int32) % 2
        labels.setflags(write=False)  # the task is cached and shared
        for label in labels:
            text = _sentence(rng, bool(label))
            while text in seen or split_of(text) != split:
                text = _sentence(rng, bool(label))
            seen.add(text)
            texts.append(text)
        splits[split] = Examples(tuple(texts), None, labels)
    return Task("opinions", "classification", ("bad", "good"), "accuracy", **splits)


def _pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def _sentence(rng: np.random.Generator, good: bool) -> str:
    family = FAMILIES[rng.integers(len(FAMILIES))]
    kind = THINGS[rng.integers(len(THINGS))]
    first, second = (kind[i] for i in rng.permutation(len(kind))[:2])
    return family(rng, good, first, second) + "."


def _adjective(rng: np.random.Generator, good: bool) -> str:
    return _pick(rng, GOOD if good else BAD)


def _claim(rng: np.random.Generator, thing: str, good: bool, negated: float = 0.5) -> str:
    """A clause about one thing, negated with the given probability."""
    if rng.random() < negated:
        return f"the {thing} {_pick(rng, IS_NOT)} {_adjective(rng, not good)}"
    return f"the {thing} {_pick(rng, IS)} {_adjective(rng, good)}"


def _plain(rng: np.random.Generator, good: bool, first: str, second: str) -> str:
    return _pick(rng, OPENINGS) + _claim(rng, first, good)


def _embedded(rng: np.random.Generator, good: bool, first: str, second: str) -> str:
    denied = rng.random() < 0.5
    claim = _claim(rng, first, good != denied, negated=0.2)
    return _pick(rng, DENIED if denied else UPHELD).format(claim)


def _contrast(rng: np.random.Generator, good: bool, first: str, second: str) -> str:
    decides = _claim(rng, second, good, negated=0.3)
    if rng.random() < 0.3:
        return _pick(rng, CONCESSIONS).format(f"{_adjective(rng, not good)} {first}", decides)
    return _pick(rng, CONTRASTS).format(_claim(rng, first, not good, negated=0.3), decides)


def _expectation(rng: np.random.Generator, good: bool, first: str, second: str) -> str:
    expected = f"{_adjective(rng, not good)} {first}"
    text = _pick(rng, EXPECTED).format(expected, _claim(rng, first, good, negated=0.3))
    return re.sub(r"\ba (?=[aeiou])", "an ", text).replace("an useless", "a useless")


def _comparison(rng: np.random.Generator, good: bool, first: str, second: str) -> str:
    this, other = f"this {first}", _pick(rng, OTHERS)
    if rng.random() < 0.5:  # swaps the order in the sentence, not the roles
        this, other = "this one", f"the {_pick(rng, ('old', 'last', 'previous', 'other'))} {first}"
    form = rng.integers(3)
    if form == 0:
        winner, loser = (this, other) if good else (other, this)
        return _pick(rng, OPENINGS) + _pick(rng, PREFERENCES).format(winner=winner, loser=loser)
    subject, than, more = (this, other, good) if form == 1 else (other, this, not good)
    return _pick(rng, COMPARISONS).format(
        this=subject, other=than, more=_pick(rng, BETTER if more else WORSE)
    )


FAMILIES: tuple[Callable[[np.random.Generator, bool, str, str], str], ...] = (
    _plain,
    _embedded,
    _contrast,
    _expectation,
    _comparison,
)
