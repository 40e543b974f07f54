"""Generated word problems in GSM8K's format, from templates; needs no data.

A problem is a beginning, some events and an ending, with zero to two arithmetic steps each, on the number of
things that somebody has:

- beginning: "Tom has 5 apples.", or "Tom has 3 boxes with 4 apples each.";
- event: the owner gets more, gives some away, or multiplies them;
- ending: how many are left; how many each friend gets; what they cost; how many another person has (k more,
  k fewer, or k times as many); how many the two have together.

No number is less than 2, so that nouns stay plural.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from darex_jax.core.errors import DarexError
from darex_jax.tasks.gsm8k import ANSWER_IS, HASHES, PROMPT, Problem
from darex_jax.tasks.splits import split_of

MOST_STEPS = 10
SIZES = {"train": 20_000, "validation": 500, "test": 500}


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("Tom Anna Ben Lily Sam Mia Leo Emma Max Nina Paul Rosa")
THINGS = _words("apples pens books stamps coins cards shells eggs balls flowers cookies marbles")

# Sentences and questions. `who` owns the things, `friend` and `other` are two more people, `k` is a number.
HAS = ("{who} has {k} {things}.", "There are {k} {things} on the table of {who}.")
BOXED = tuple(f"{{who}} has {{k}} {box} with {{each}} {{things}} each." for box in ("boxes", "bags", "jars"))
GETS = (
    "{who} buys {k} more {things}.",
    "{who} finds {k} more {things}.",
    "{friend} gives {who} {k} {things}.",
    "Then {who} gets {k} more {things}.",
)
GIVES = (
    "{who} loses {k} {things}.",
    "{who} sells {k} {things}.",
    "{who} gives {k} {things} to {friend}.",
    "Then {who} gives away {k} {things}.",
)
GROWS = ("A year later {who} has {k} times as many {things}.",)
LEFT = ("How many {things} does {who} have now?", "How many {things} does {who} have in the end?")
SHARED = (
    "{who} shares the {things} equally among {k} friends. How many {things} does each friend get?",
    "{who} puts the {things} into {k} equal boxes. How many {things} are in each box?",
)
PRICED = (
    "{who} sells each of the {things} for {k} dollars. How many dollars does {who} get?",
    "Each of the {things} costs {k} dollars. How many dollars do the {things} cost?",
)
COMPARED = {
    "+": ("{other} has {k} more {things} than {who}.",),
    "-": ("{other} has {k} fewer {things} than {who}.",),
    "*": ("{other} has {k} times as many {things} as {who}.",),
}
OF_OTHER = ("How many {things} does {other} have?",)
TOGETHER = ("How many {things} do {who} and {other} have together?",)

# Solution lines.
OWNED = "{who} has {sum} {things}."
OTHER_OWNED = "{other} has {sum} {things}."
EACH = "Each gets {sum} {things}."
PRICE = "The {things} cost {sum} dollars."
BOTH = "Together they have {sum} {things}."


class WordProblems(NamedTuple):
    """Splits: `train` for training, `validation` for choosing q, `test` for reported results."""

    train: tuple[Problem, ...]
    validation: tuple[Problem, ...]
    test: tuple[Problem, ...]


@lru_cache(maxsize=4)  # takes seconds, and every search and evaluation needs it
def word_problems(seed: int = 0, max_steps: int = 3, largest: int = 20) -> WordProblems:
    """The task, a function of its arguments only; no question occurs twice, within or across splits, nor in
    different splits of different arguments (`split_of`).

    The same arithmetic can occur again with other names and things.

    Args:
      max_steps: problems have 1 to `max_steps` steps, each number equally often in every split.
      largest: upper bound of all numbers in questions and solutions.
    Raises: ValueError if `max_steps` is not in [1, 10] (longer ones rarely succeed), or `largest` is less
      than 10 (too few problems).
    """
    if not 1 <= max_steps <= MOST_STEPS or largest < 10:
        raise DarexError(
            f"need max_steps in [1, {MOST_STEPS}] and largest >= 10, got {max_steps} and {largest}."
        )
    rng = np.random.default_rng(seed)
    seen: set[str] = set()

    def fresh(split: str, steps: int) -> Problem:
        while True:
            with suppress(_DeadEnd):
                problem = _problem(rng, steps, largest)
                if problem.question not in seen and split_of(problem.question) == split:
                    seen.add(problem.question)
                    return problem

    return WordProblems(
        **{name: tuple(fresh(name, 1 + i % max_steps) for i in range(size)) for name, size in SIZES.items()}
    )


def _pick(rng: np.random.Generator, items: Sequence[Any]) -> Any:
    return items[int(rng.integers(len(items)))]


class _DeadEnd(Exception):
    """No valid number exists: the generator discards this problem and starts another."""


class _Story:
    """A problem under construction: sentences, solution lines, and the number of things `who` has."""

    def __init__(self, rng: np.random.Generator, largest: int):
        who, friend, other = (NAMES[i] for i in rng.permutation(len(NAMES))[:3])
        self.words = {"who": who, "friend": friend, "other": other, "things": _pick(rng, THINGS)}
        self.rng, self.largest = rng, largest
        self.sentences: list[str] = []
        self.lines: list[str] = []
        self.held = 0
        self.result = 0  # of the last step

    def operand(self, sign: str, a: int) -> int:
        """A random b >= 2 for which `a sign b` is in range. Raises: _DeadEnd if there is none."""
        if sign == "/":
            fitting: Sequence[int] = [b for b in range(2, a) if a % b == 0]
        else:
            most = {"+": self.largest - a, "-": a - 2, "*": self.largest // a}[sign]
            fitting = range(2, most + 1)
        if not fitting:
            raise _DeadEnd
        return _pick(self.rng, fitting)

    def add_sentence(self, texts: Sequence[str], **numbers: int) -> None:
        self.sentences.append(_pick(self.rng, texts).format(**self.words, **numbers))

    def add_step(self, line: str, a: int, sign: str, b: int) -> int:
        """Adds `line` with the step `a sign b`. Returns: the result. Raises: _DeadEnd if it is out of
        range."""
        result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
        if result > self.largest:
            raise _DeadEnd
        written = f"{a} {sign} {b} = <<{a}{sign}{b}={result}>>{result}"
        self.lines.append(line.format(sum=written, **self.words))
        self.result = result
        return result


def _has(story: _Story) -> None:
    story.held = _pick(story.rng, range(2, story.largest + 1))
    story.add_sentence(HAS, k=story.held)


def _boxed(story: _Story) -> None:
    boxes = _pick(story.rng, range(2, story.largest // 2 + 1))
    each = story.operand("*", boxes)
    story.add_sentence(BOXED, k=boxes, each=each)
    story.held = story.add_step(OWNED, boxes, "*", each)


def _event(story: _Story) -> None:
    sign, texts = _pick(story.rng, (("+", GETS), ("-", GIVES), ("*", GROWS)))
    k = story.operand(sign, story.held)
    story.add_sentence(texts, k=k)
    story.held = story.add_step(OWNED, story.held, sign, k)


def _left(story: _Story) -> None:
    story.add_sentence(LEFT)


def _shared(story: _Story) -> None:
    k = story.operand("/", story.held)
    story.add_sentence(SHARED, k=k)
    story.add_step(EACH, story.held, "/", k)


def _priced(story: _Story) -> None:
    k = story.operand("*", story.held)
    story.add_sentence(PRICED, k=k)
    story.add_step(PRICE, story.held, "*", k)


def _compared(story: _Story) -> int:
    sign = _pick(story.rng, tuple(COMPARED))
    k = story.operand(sign, story.held)
    story.add_sentence(COMPARED[sign], k=k)
    return story.add_step(OTHER_OWNED, story.held, sign, k)


def _of_other(story: _Story) -> None:
    _compared(story)
    story.add_sentence(OF_OTHER)


def _together(story: _Story) -> None:
    others = _compared(story)
    story.add_sentence(TOGETHER)
    story.add_step(BOTH, story.held, "+", others)


# Number of steps of each.
BEGINNINGS: dict[Callable[[_Story], None], int] = {_has: 0, _boxed: 1}
ENDINGS: dict[Callable[[_Story], None], int] = {_left: 0, _shared: 1, _priced: 1, _of_other: 1, _together: 2}


def _problem(rng: np.random.Generator, steps: int, largest: int) -> Problem:
    """A problem of `steps` steps. Raises: _DeadEnd if the construction fails."""
    story = _Story(rng, largest)
    beginning = _pick(rng, [part for part, sums in BEGINNINGS.items() if sums <= steps])
    left = steps - BEGINNINGS[beginning]
    ending = _pick(rng, [part for part, sums in ENDINGS.items() if sums <= left])
    beginning(story)
    for _ in range(left - ENDINGS[ending]):
        _event(story)
    ending(story)
    solution = "\n".join((*story.lines, f"{HASHES} {story.result}"))
    return Problem(" ".join(story.sentences), solution, Fraction(story.result))


_PIECES = r" ?[A-Za-z']+| ?#+|[0-9]|\s| ?[^A-Za-z0-9\s]"


def word_problem_tokenizer() -> Any:
    """A word-level tokenizer for these problems, their solutions in both formats and the prompt.

    A word with its leading space is one token, a digit is one token, and decoding is exact. A text starts
    with `<s>`, an answer ends with `</s>`, padding is on the left.

    Returns: a Hugging Face tokenizer, which `load_tokenizer` reads after `save_pretrained`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*special, *_vocabulary()])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _vocabulary() -> list[str]:
    """Every token of a text: words and signs with and without a leading space, and digits."""
    texts = [HAS, BOXED, GETS, GIVES, GROWS, LEFT, SHARED, PRICED, *COMPARED.values(), OF_OTHER, TOGETHER]
    lines = [OWNED, OTHER_OWNED, EACH, PRICE, BOTH, PROMPT, ANSWER_IS, HASHES, "+ - * / = < >"]
    written = [re.sub(r"\{\w+\}", "", text) for text in (*sum(texts, ()), *lines, *NAMES, *THINGS)]
    words = {piece.strip() for text in written for piece in re.findall(_PIECES, text)} - {""}
    return [*"0123456789", " ", "\n", *sorted(words), *(f" {word}" for word in sorted(words))]
