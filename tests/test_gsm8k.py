"""GSM8K: the prompt, answer extraction, the data layout, and resumable evaluation."""

import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darex_jax.core.errors import FileError
from darex_jax.evaluation.gsm8k import evaluate_gsm8k
from darex_jax.tasks.gsm8k import (
    ANSWER_IS,
    HASHES,
    Problem,
    extract_answer,
    gold_answer,
    gsm8k_prompt,
    load_gsm8k,
    metamath_solution,
)

SOLUTION = "He has 2 * 540 = <<2*540=1080>>1080 left.\nThat is $<<1080*1=1080>>1080.\n#### 1,080"


def test_the_prompt_is_the_protocols_to_the_letter():
    assert gsm8k_prompt("How many {eggs}?") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nHow many {eggs}?\n\n### Response: Let's think step by step."
    )


# The answer.


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("5", 5),
        ("5.", 5),
        ("5\n\n### Instruction:\nWhat is 7 + 8?", 5),
        ("0", 0),
        ("007", 7),
        ("1,234", 1234),
        ("1,234,567.", 1234567),
        ("1,234, which is a lot", 1234),
        ("3, 4", 3),
        ("12.50", "12.5"),
        (".5", "0.5"),
        ("...5", 5),
        ("1.5.2", "1.5"),
        ("0.1", "1/10"),  # no binary rounding
        ("-5", -5),
        ("- 5", 5),  # a bullet
        ("+5", 5),
        ("\u22125", -5),  # minus sign
        ("5\u201310 days", 5),  # en dash
        ("$18", 18),
        (r"\$18", 18),
        ("-$18", -18),
        ("$-18", -18),
        ("€1,000.50", "1000.5"),
        ("50%", 50),
        (r"50\%", 50),
        ("5 apples and 3 pears", 5),
        ("12cm", 12),
        ("12:30", 12),
        ("x = 7", 7),
        ("5 + 3 = 8", 5),
        ("1e5", 1),
        ("3/4", "3/4"),
        ("3 / 4 of a cup", "3/4"),
        ("-3/4", "-3/4"),
        ("1/-2", "-1/2"),
        ("1.5/2", "3/4"),
        ("1,000/3", "1000/3"),
        ("10/2", 5),
        ("1 1/2 cups", "3/2"),
        ("-1 1/2", "-3/2"),
        ("5/0", None),
        ("5 1/0", None),
        ("5/0.00", None),
        (r"$\boxed{42}$", 42),
        (r"\boxed{-1,000}.", -1000),
        (r"\frac{3}{4}", "3/4"),
        (r"$\boxed{\dfrac{1,000}{3}}$", "1000/3"),
        (r"\tfrac12", "1/2"),
        (r"-\frac{1}{2}", "-1/2"),
        (r"\frac{-1}{2}", "-1/2"),
        (r"1\frac{1}{2}", "3/2"),
        (r"1 \frac12", "3/2"),
        (r"\frac{5}{0}", None),
        (r"\frac{3", 3),
        (r"10{,}000", 10000),
        (r"10,\!000", 10000),
        (r"\text{about } 5", 5),
        ("9" * 1000, int("9" * 1000)),
        ("9" * 1001, None),
        ("\u0663", None),  # a digit of another script
        ("five", None),
        ("", None),
        ("   ", None),
        ("-", None),
        ("$.", None),
    ],
)
@pytest.mark.parametrize("marker", [ANSWER_IS, HASHES])
def test_the_number_after_the_marker(written, value, marker):
    expected = None if value is None else Fraction(value)
    assert extract_answer(f"2 + 2 = 4.\n{marker}{written}", marker) == expected
    assert extract_answer(f"{marker}99\n{marker}{written}", marker) == expected  # the last marker counts


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "5",
        "The answer is 5",
        "The answer is:5",
        "the answer is: 5",
        "Answer: 5",
        "#### 5",
        "The answer is: ",
    ],
)
def test_without_the_marker_and_a_number_there_is_no_answer(completion):
    assert extract_answer(completion) is None


def test_the_markers_do_not_mix():
    both = "#### 5\nThe answer is: 7"
    assert extract_answer(both) == 7
    assert extract_answer(both, HASHES) == 5
    assert extract_answer("##### 5", HASHES) == 5


@given(st.text(max_size=200), st.sampled_from([ANSWER_IS, HASHES]))
def test_any_text_is_handled(text, marker):
    assert isinstance(extract_answer(marker + text, marker), Fraction | None)


@given(st.text(alphabet="0123456789,./ -+$\\{}frac!%\n#", max_size=60))
def test_any_arrangement_of_number_characters_is_handled(text):
    answer = extract_answer(ANSWER_IS + text)
    assert isinstance(answer, Fraction | None)
    assert any(c in "0123456789" for c in text) or answer is None


@given(st.integers(-(10**30), 10**30), st.sampled_from(["", ".", "%", " apples", "\n", " dollars, so 3"]))
def test_a_whole_number_reads_back_with_commas_and_without(n, after):
    for written in (f"{n}", f"{n:,}", f"${n:,}", rf"\boxed{{{n}}}"):
        assert extract_answer(f"{ANSWER_IS}{written}{after}") == n


@given(st.integers(-(10**9), 10**9), st.integers(1, 10**9), st.integers(0, 10**9))
def test_fractions_and_decimals_read_back(top, bottom, thousandths):
    for written in (f"{top}/{bottom}", f"{top} / {bottom}", rf"\frac{{{top}}}{{{bottom}}}"):
        assert extract_answer(ANSWER_IS + written) == Fraction(top, bottom)
    mixed = abs(top) + Fraction(thousandths, bottom)
    assert extract_answer(f"{ANSWER_IS}{abs(top)} {thousandths}/{bottom}") == mixed
    decimal = f"{thousandths // 1000:,}.{thousandths % 1000:03}"
    assert extract_answer(ANSWER_IS + decimal) == Fraction(thousandths, 1000)


@pytest.mark.parametrize(
    "text",
    ["1,", "-", "$", "1 ", "1/", ".", "\\frac{1", "\\frac{1}{", "1\\", "The answer is: ", "0", "1 1/", "-$"],
)
def test_long_hostile_texts_take_linear_time(text):
    started = time.process_time()
    extract_answer(ANSWER_IS + text * (300_000 // len(text)) + "x")
    assert time.process_time() - started < 3  # measured: under 0.2 s; quadratic would be hours


# Solutions.


def test_gold_answers():
    assert gold_answer(SOLUTION) == 1080
    with pytest.raises(ValueError, match=r"no '#### N' in the solution 'He has 5\.'"):
        gold_answer("He has 5.")


def test_a_solution_in_metamaths_form():
    assert metamath_solution(SOLUTION) == (
        "He has 2 * 540 = 1080 left.\nThat is $1080.\n#### 1,080\nThe answer is: 1,080"
    )
    assert extract_answer(metamath_solution(SOLUTION)) == 1080


# Data.


def write(folder: Path, split: str, rows: dict[str, list[str]]) -> None:
    from datasets import Dataset

    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(rows).to_parquet(folder / f"{split}.parquet")


def test_a_folder_of_parquet_is_read_in_order(tmp_path):
    rows = {"question": ["a?", "b?"], "answer": ["#### 1", SOLUTION]}
    write(tmp_path / "gsm8k", "test", rows)  # the test split can be read without a train split
    expected = (Problem("a?", "#### 1", Fraction(1)), Problem("b?", SOLUTION, Fraction(1080)))
    assert load_gsm8k("test", tmp_path) == load_gsm8k("test", tmp_path / "gsm8k") == expected


def test_missing_and_wrong_data_is_explained(tmp_path, monkeypatch):
    import datasets

    with pytest.raises(ValueError, match="GSM8K has the splits 'train' and 'test', not 'validation'"):
        load_gsm8k("validation", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"train\*.parquet of 'gsm8k' are not in '.*gsm8k' or '"):
        load_gsm8k("train", tmp_path)
    write(tmp_path, "test", {"question": ["a?"], "solution": ["#### 1"]})
    with pytest.raises(ValueError, match="lacks the column 'answer' of 'gsm8k'"):
        load_gsm8k("test", tmp_path)
    write(tmp_path, "train", {"question": ["a?"], "answer": ["one"]})
    with pytest.raises(ValueError, match=r"train.parquet', row 0 .*: no '#### N' in the solution 'one'"):
        load_gsm8k("train", tmp_path)
    write(tmp_path / "null", "train", {"question": ["a?", None], "answer": ["#### 1", "#### 2"]})
    with pytest.raises(ValueError, match=r"row 1 \(counted from 0\): 'question' is None, expected a string"):
        load_gsm8k("train", tmp_path / "null")

    def refuse(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    message = r"'openai/gsm8k' cannot .*\(ConnectionError\).*'gsm8k' \(data_dir.*'word-problems'"
    with pytest.raises(FileNotFoundError, match=message):
        load_gsm8k("test")


@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_real_gsm8k(split, count):
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("DAREX_DATA_DIR", root.parent / "shared" / "data"))
    if not (folder / "gsm8k").is_dir():
        pytest.skip(f"no real GSM8K: set DAREX_DATA_DIR to a folder that holds gsm8k/{split}.parquet")
    problems = load_gsm8k(split, folder)
    assert len(problems) == count
    for problem in problems:
        assert problem.answer.denominator == 1
        assert f"{problem.solution.rpartition('####')[2].strip()}".replace(",", "") == str(problem.answer)
        assert extract_answer(metamath_solution(problem.solution)) == problem.answer
        assert "<<" not in metamath_solution(problem.solution)


# Evaluation.


def problem(n: int, words: int = 1) -> Problem:
    return Problem(f"What is {n}{' indeed' * words}?", f"#### {n}", Fraction(n))


PROBLEMS = [problem(n, words=(7 * n) % 5) for n in range(13)]
SETTINGS = {"model": "abc", "decoding": {"max_new_tokens": 16}}


def answers(prompts: list[str]) -> list[str]:
    """A model with correct answers for even numbers, wrong ones for 1, 5, 9 and none for 3, 7, 11."""
    said = []
    for prompt in prompts:
        n = int(prompt.partition("What is ")[2].split()[0].strip("?"))
        said.append(f"So.\nThe answer is: {n if n % 2 == 0 else n + 1}" if n % 4 != 3 else "\ud83d I give up")
    return said


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_index(path):
    return sorted(lines(path)[1:], key=lambda record: record["index"])


def never(prompts):
    raise AssertionError(f"asked again: {prompts}")


@pytest.fixture
def whole(tmp_path):
    """The records of a run without interruption."""
    evaluate_gsm8k(PROBLEMS, answers, tmp_path / "whole.jsonl", SETTINGS, batch_size=4)
    return tmp_path / "whole.jsonl"


def test_accuracy_records_and_progress(tmp_path):
    seen, path = [], tmp_path / "new" / "records.jsonl"
    result = evaluate_gsm8k(
        PROBLEMS, answers, path, SETTINGS, batch_size=4, on_batch=lambda *state: seen.append(state)
    )
    assert result == {
        "metric": 7 / 13,
        "metric_name": "accuracy",
        "standard_error": pytest.approx((7 / 13 * 6 / 13 / 13) ** 0.5),
        "unanswered": 3,
        "n": 13,
    }
    assert [answered for answered, _ in seen] == [0, 4, 8, 12, 13] and seen[-1][1] == 7
    header, *records = lines(path)
    assert header["settings"].items() >= SETTINGS.items() and header["settings"]["problems"] == 13
    assert by_index(path)[5] == {
        "index": 5,
        "prompt": gsm8k_prompt(PROBLEMS[5].question),
        "completion": "So.\nThe answer is: 6",
        "extracted": "6",
        "gold": "5",
        "correct": False,
    }
    lengths = [len(record["prompt"]) for record in records]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("batch_size", [1, 5, 50])
def test_the_result_does_not_depend_on_the_batches(tmp_path, whole, batch_size):
    path = tmp_path / "other.jsonl"
    evaluate_gsm8k(PROBLEMS, answers, path, SETTINGS, batch_size=batch_size)
    assert by_index(path) == by_index(whole)
    order = [12, 0, *range(11, 0, -1)]
    shuffled = evaluate_gsm8k([PROBLEMS[i] for i in order], answers, tmp_path / "shuffled.jsonl", SETTINGS)
    assert shuffled == evaluate_gsm8k(PROBLEMS, never, whole, SETTINGS)


def test_a_killed_run_resumes(tmp_path, whole):
    """SIGKILL in the middle of the third batch: two are kept, and nothing is generated twice."""
    path = tmp_path / "killed.jsonl"
    script = f"""
import os, signal, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
from test_gsm8k import PROBLEMS, SETTINGS, answers, evaluate_gsm8k
calls = []
def generate(prompts):
    calls.append(prompts)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return answers(prompts)
evaluate_gsm8k(PROBLEMS, generate, {str(path)!r}, SETTINGS, batch_size=4)
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert lines(path) == lines(whole)[:9]
    asked, seen = [], []

    def generate(prompts):
        asked.extend(prompts)
        return answers(prompts)

    result = evaluate_gsm8k(
        PROBLEMS, generate, path, SETTINGS, batch_size=4, on_batch=lambda *state: seen.append(state)
    )
    assert path.read_bytes() == whole.read_bytes() and len(asked) == 5 and seen[0][0] == 8
    assert result == evaluate_gsm8k(PROBLEMS, never, whole, SETTINGS)


def test_an_incomplete_line_is_generated_again(tmp_path, whole):
    content = whole.read_bytes()
    header = content.index(b"\n") + 1
    last = content[:-1].rindex(b"\n") + 1
    path = tmp_path / "broken.jsonl"
    for cut in (
        *range(0, header + 1, 17),
        header - 1,
        header,
        *range(last, len(content), 7),
        len(content) - 1,
    ):
        path.write_bytes(content[:cut])
        evaluate_gsm8k(PROBLEMS, answers, path, SETTINGS, batch_size=4)
        assert path.read_bytes() == content, cut


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": SETTINGS | {"model": "def"}}, "model is 'abc' there and 'def' here"),
        ({"settings": {"model": "abc"}}, r"decoding is \{'max_new_tokens': 16\} there and None here"),
        ({"settings": SETTINGS | {"delta": "d"}}, "delta is None there and 'd' here"),
        ({"marker": "####"}, "marker is 'The answer is: ' there and '####' here"),
        ({"problems": PROBLEMS[:5]}, "problems is 13 there and 5 here"),
        ({"problems": [*PROBLEMS[:12], problem(99)]}, "problems_sha256 is '.{64}' there and '.{64}' here"),
    ],
)
def test_records_with_other_settings_are_refused(whole, changes, message):
    arguments = {"problems": PROBLEMS, "settings": SETTINGS} | changes
    before = whole.read_bytes()
    with pytest.raises(ValueError, match=rf"whole.jsonl was written with other settings: {message}.*delete"):
        evaluate_gsm8k(generate=never, records=whole, **arguments)
    assert whole.read_bytes() == before


@pytest.mark.parametrize("content", [b"{", b"my notes", b"my notes\n", b'{"a": 1}\n', b"[1]\n\n", b"\xff\n"])
def test_a_file_of_another_kind_is_left_alone(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content + b"x")
    with pytest.raises(ValueError, match=r"notes.txt is not a file of GSM8K records"):
        evaluate_gsm8k(PROBLEMS, never, path, SETTINGS)
    assert path.read_bytes() == content + b"x"


def test_two_runs_do_not_share_a_file(tmp_path):
    path = tmp_path / "records.jsonl"

    def second_run(prompts):
        with pytest.raises(FileError, match=r"another run is writing its answers to .*records.jsonl"):
            evaluate_gsm8k(PROBLEMS, never, path, SETTINGS)
        return answers(prompts)

    result = evaluate_gsm8k(PROBLEMS, second_run, path, SETTINGS)
    assert evaluate_gsm8k(PROBLEMS, never, path, SETTINGS) == result


def test_damage_and_wrong_arguments_are_explained(tmp_path, whole):
    written = whole.read_bytes().splitlines(keepends=True)
    path = tmp_path / "damaged.jsonl"
    path.write_bytes(b"".join([*written[:3], b"{}\n", *written[3:]]))
    with pytest.raises(ValueError, match=r"damaged.jsonl: line 4 is damaged; delete the line or the file"):
        evaluate_gsm8k(PROBLEMS, never, path, SETTINGS)
    path.write_bytes(b"".join([*written, written[4]]))
    with pytest.raises(ValueError, match=r"damaged.jsonl: line 15: duplicate or out-of-range index"):
        evaluate_gsm8k(PROBLEMS, never, path, SETTINGS)
    with pytest.raises(ValueError, match="generate returned 1 completions for 8 prompts"):
        evaluate_gsm8k(PROBLEMS, lambda prompts: ["5"], tmp_path / "short.jsonl", SETTINGS)
    for wrong in ({"batch_size": 0}, {"problems": []}):
        arguments = {"problems": PROBLEMS} | wrong
        with pytest.raises(ValueError, match="need batch_size >= 1 and problems, got"):
            evaluate_gsm8k(generate=never, records=path, settings=SETTINGS, **arguments)
