"""The generated word problems and their tokenizer."""

import hashlib
import json
import re
from collections import Counter
from fractions import Fraction

import pytest

from darex_jax.tasks.batching import load_tokenizer
from darex_jax.tasks.gsm8k import extract_answer, gold_answer, gsm8k_prompt, metamath_solution
from darex_jax.tasks.word_problems import NAMES, SIZES, word_problem_tokenizer, word_problems

SUM = re.compile(r"(\d+) ([-+*/]) (\d+) = <<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)")


@pytest.fixture(scope="module")
def problems():
    return word_problems()


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


def test_a_function_of_its_arguments(problems):
    text = "\n".join(p.question + p.solution for p in problems.test).encode()
    assert hashlib.sha256(text).hexdigest()[:16] == "da6d786b43f3f033"  # another one: raise EDITION
    assert word_problems(seed=1).test[:50] != problems.test[:50]


def test_no_seed_and_no_difficulty_trains_on_what_another_tests(problems):
    for other in (word_problems(seed=1), word_problems(seed=1, max_steps=1)):
        tested = {p.question for p in (*other.test, *other.validation)}
        assert tested.isdisjoint(p.question for p in problems.train)
        assert {p.question for p in other.test}.isdisjoint(p.question for p in problems.validation)


def test_splits_are_distinct_and_of_one_kind(problems):
    assert {name: len(split) for name, split in problems._asdict().items()} == SIZES
    questions = [p.question for split in problems for p in split]
    assert len(set(questions)) == len(questions)
    for split in problems:
        steps = Counter(p.solution.count("<<") for p in split)
        assert set(steps) == {1, 2, 3} and max(steps.values()) - min(steps.values()) <= 1


@pytest.mark.parametrize(("max_steps", "largest"), [(1, 10), (3, 20), (5, 100)])
def test_difficulty(problems, max_steps, largest, monkeypatch):
    monkeypatch.setattr("darex_jax.tasks.word_problems.SIZES", {"train": 600, "validation": 9, "test": 9})
    hard = word_problems(max_steps=max_steps, largest=largest).train
    assert {p.solution.count("<<") for p in hard} == set(range(1, max_steps + 1))
    found = [n for p in hard for n in numbers(p.question + p.solution)]
    assert min(found) == 2 and 0.8 * largest < max(found) <= largest


def test_every_sum_is_right_and_the_last_one_is_the_answer(problems):
    for p in (*problems.train[:3000], *problems.test):
        sums = SUM.findall(p.solution)
        for a, sign, b, *annotation, result in sums:
            assert annotation == [a, sign, b, result]
            a, b = Fraction(a), Fraction(b)
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[sign] == int(result)
        assert p.answer == gold_answer(p.solution) == int(sums[-1][-1])
        assert extract_answer(metamath_solution(p.solution)) == p.answer
        # Operands were stated or computed before, and everything stated is used.
        known = Counter(numbers(p.question)) + Counter(int(s[-1]) for s in sums)
        used = {int(n) for s in sums for n in (s[0], s[2])}
        assert set(numbers(p.question)) <= used <= set(known)


@pytest.mark.parametrize(
    ("pattern", "answer"),
    [
        (r"\w+ has (\d+) \w+\. \w+ buys (\d+) more \w+\. \D+", lambda a, b: a + b),
        (r"\w+ has (\d+) \w+\. \w+ sells (\d+) \w+\. \D+", lambda a, b: a - b),
        (r"\w+ has (\d+) \w+ with (\d+) \w+ each\. How many \D+", lambda a, b: a * b),
        (r"\w+ has (\d+) \w+\. \w+ shares the \w+ equally among (\d+) friends\. \D+", lambda a, b: a / b),
        (r"\w+ has (\d+) \w+\. Each of the \w+ costs (\d+) dollars\. \D+", lambda a, b: a * b),
        (r"\w+ has (\d+) \w+\. \w+ has (\d+) more \D+ does \w+ have\?", lambda a, b: a + b),
        (r"\w+ has (\d+) \w+\. \w+ has (\d+) fewer \D+ does \w+ have\?", lambda a, b: a - b),
        (r"\w+ has (\d+) \w+\. \w+ has (\d+) times as many \D+ have together\?", lambda a, b: a * b + a),
        (r"\w+ has (\d+) \w+\. \w+ has (\d+) fewer \D+ have together\?", lambda a, b: a - b + a),
    ],
)
def test_plain_questions_mean_what_they_say(problems, pattern, answer):
    """The answer computed from the question only, for forms that a pattern can parse."""
    found = [(m, p.answer) for p in problems.train if (m := re.fullmatch(pattern, p.question))]
    assert len(found) >= 5
    assert all(answer(*map(Fraction, match.groups())) == expected for match, expected in found)


def test_guessing_scores_low(problems):
    train, test = (Counter(p.answer for p in split) for split in (problems.train, problems.test))
    commonest = train.most_common(1)[0][0]
    size = len(problems.test)
    assert test[commonest] / size < 0.2
    for guess in (sum, max, min, lambda told: told[0], lambda told: told[-1]):
        assert sum(guess(numbers(p.question)) == p.answer for p in problems.test) / size < 0.4


def test_wrong_arguments_are_explained():
    for wrong in ({"max_steps": 0}, {"max_steps": 11}, {"largest": 9}):
        with pytest.raises(ValueError, match=r"need max_steps in \[1, 10\] and largest >= 10, got"):
            word_problems(**wrong)


# The tokenizer.


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Saved beside a Llama's config.json and loaded as a checkpoint's would be."""
    folder = tmp_path_factory.mktemp("tokenizer")
    word_problem_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return load_tokenizer(folder)


def test_texts_round_trip_exactly(problems, tokenizer):
    for p in problems.test[:200]:
        for text in (gsm8k_prompt(p.question), p.solution, metamath_solution(p.solution)):
            ids = tokenizer(text)["input_ids"]
            assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_tokenizer_is_small_and_splits_digits(problems, tokenizer):
    assert len(tokenizer) < 300
    assert tokenizer.convert_ids_to_tokens(tokenizer("Tom has 17 apples.")["input_ids"]) == [
        "<s>", "Tom", " has", " ", "1", "7", " apples", "."
    ]  # fmt: skip
    whole = [gsm8k_prompt(p.question) + metamath_solution(p.solution) for p in problems.test]
    assert max(map(len, tokenizer(whole)["input_ids"])) <= 160
    assert tokenizer.unk_token_id in tokenizer("Zebras ate 3 apples.")["input_ids"]
    padded = tokenizer(["Tom", "Tom has"], padding=True)
    assert tokenizer.padding_side == "left" and padded["attention_mask"] == [[0, 1, 1], [1, 1, 1]]
    assert all(tokenizer.unk_token_id not in tokenizer(name)["input_ids"] for name in NAMES)
