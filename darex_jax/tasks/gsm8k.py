"""GSM8K: grade-school word problems, the prompt, and extraction of the answer from a completion.

Source: GSM8K, arXiv:2110.14168; evaluated with MetaMath's prompt and marker (arXiv:2309.12284), as in DAREx
(arXiv:2410.09344).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from fractions import Fraction

from darex_jax.core.errors import DarexError
from darex_jax.tasks.parquet import find_parquet, read_split

HUB = ("openai/gsm8k", "main")
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{question}\n\n### Response: Let's think step by step."
)
ANSWER_IS = "The answer is: "  # precedes the answer in MetaMath models' completions
HASHES = "####"  # the same for Abel models and GSM8K's own solutions


@dataclass(frozen=True)
class Problem:
    """A word problem.

    Attributes:
      question: its text.
      solution: one line per step, with annotations `<<5+3=8>>`; the last line is `#### N`.
      answer: N.
    """

    question: str
    solution: str
    answer: Fraction


def load_gsm8k(split: str = "test", data_dir: str | os.PathLike[str] | None = None) -> tuple[Problem, ...]:
    """GSM8K in its official order.

    Args:
      split: "train" or "test".
      data_dir: folder of `{split}*.parquet`, or one that contains such a folder `gsm8k`; None downloads from
        the hub.
    Raises: FileNotFoundError if there is no data; ValueError for an unknown split, files with another layout,
      or a solution that does not end in `#### N`.
    """
    if split not in ("train", "test"):
        raise DarexError(f"GSM8K has the splits 'train' and 'test', not {split!r}.")
    files = None if data_dir is None else find_parquet("gsm8k", data_dir, (split,))[split]
    columns = ("question", "answer")
    read = read_split("gsm8k", split, columns, files=files, hub=HUB, generated="word-problems")
    problems = []
    for row, (question, solution) in enumerate(zip(*map(read.texts, columns), strict=True)):
        try:
            problems.append(Problem(question, solution, gold_answer(solution)))
        except DarexError as error:
            raise DarexError(f"{read.place(row)}: {error}") from error
    return tuple(problems)


def gsm8k_prompt(question: str) -> str:
    """The zero-shot prompt (Alpaca's form) of the evaluation protocol."""
    return PROMPT.format(question=question)


def metamath_solution(solution: str) -> str:
    """GSM8K's solution in MetaMath's form: without `<<...>>`, and with a last line `The answer is: N`."""
    plain = re.sub(r"<<[^<>]*>>", "", solution)
    return f"{plain}\n{ANSWER_IS}{solution.rpartition(HASHES)[2].strip()}"


def gold_answer(solution: str) -> Fraction:
    """N of a solution that ends in `#### N`. Raises: ValueError if there is none."""
    answer = extract_answer(solution, HASHES)
    if answer is None:
        raise DarexError(f"no '#### N' in the solution {solution[-80:]!r}.")
    return answer


_MAX_DIGITS = 1000  # Python converts up to 4300, and a mixed number has up to three times as many
_SPELLINGS = {"\u2212": "-", "\u2013": "-", "{,}": ",", r"\!": "", r"\$": "$"}  # minus signs, LaTeX commas
# Possessive repetitions keep the matching time linear in the text.
_NUMBER = r"(?:[0-9]++(?:,[0-9]++)*+(?:\.[0-9]++)?+|(?<!\.)\.[0-9]++)"
_LATEX_FRACTION = re.compile(rf"\\[dt]?frac(?:\{{(-?{_NUMBER})\}}|([0-9]))(?:\{{(-?{_NUMBER})\}}|([0-9]))")
_VALUE = re.compile(
    rf"(?P<minus>-?)[$€£]?(?P<first>{_NUMBER})"
    rf"(?: ?/ ?(?P<divisor>-?{_NUMBER})| (?P<top>[0-9]++)/(?P<bottom>[0-9]++))?+"
)


def extract_answer(completion: str, marker: str = ANSWER_IS) -> Fraction | None:
    r"""The first number after the last `marker`; None without a marker or a number after it.

    Commas are removed, `3/4`, `1 1/2`, `\frac{3}{4}` and `1\frac12` are evaluated. Currency signs, units,
    percent signs (50% is 50), `\boxed{...}`, a full stop and any text after the number are ignored. A
    division by zero and a number of more than 1,000 digits give None. The marker is matched literally: "The
    answer is 5", without the colon, gives None as well, since the protocol's models are trained to write it.

    Args:
      completion: any text; takes time linear in its length.
      marker: `ANSWER_IS`, or `HASHES` for Abel's models.
    Returns: the exact value, which can be compared with `==`.
    Source: the protocol of MetaMath (arXiv:2309.12284). Their script rounds to whole numbers, so that 5.4
      counts as 5, and reads one separator per number, so that 1,234,567 is 1234; here both are exact.
    """
    _, found, text = completion.rpartition(marker)
    if not found:
        return None
    for spelling, plain in _SPELLINGS.items():
        text = text.replace(spelling, plain)
    text = re.sub(r"([0-9])\\", r"\1 \\", text)  # 1\frac12 is 1 1/2
    text = _LATEX_FRACTION.sub(r"\1\2/\3\4", text)
    match = _VALUE.search(text)
    if match is None or any(len(part) > _MAX_DIGITS for part in match.groups("")):
        return None
    first, divisor, top, bottom = (
        Fraction((match[name] or default).replace(",", ""))
        for name, default in (("first", "0"), ("divisor", "1"), ("top", "0"), ("bottom", "1"))
    )
    if not divisor or not bottom:
        return None
    value = first / divisor + top / bottom
    return -value if match["minus"] else value
