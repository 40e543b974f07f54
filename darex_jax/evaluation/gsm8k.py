"""Accuracy on GSM8K or generated word problems, with a record of every answer for resuming."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from darex_jax.core.errors import DarexError
from darex_jax.files.atomic import only_one
from darex_jax.files.paths import read_bytes
from darex_jax.tasks.gsm8k import ANSWER_IS, PROMPT, Problem, extract_answer, gsm8k_prompt


def evaluate_gsm8k(
    problems: Sequence[Problem],
    generate: Callable[[list[str]], list[str]],
    records: str | os.PathLike[str],
    settings: Mapping[str, Any],
    *,
    batch_size: int = 8,
    marker: str = ANSWER_IS,
    on_batch: Callable[[int, int], None] = lambda answered, correct: None,
) -> dict[str, Any]:
    """Generates zero-shot answers to all problems and compares their numbers with the correct ones, exactly.

    `records` is a JSON lines file. The first line has the settings; every other line one answer: its
    problem's index, prompt, completion, extracted (the number as a string such as `7/2`, or null), gold,
    correct. A batch is written to disk before the next one starts. If the file exists, its complete lines are
    kept, and only the remaining problems are generated.

    Args:
      problems: from `load_gsm8k` or `word_problems`.
      generate: prompts -> completions, in the same order.
      settings: everything else that determines the answers and must agree when resuming, JSON-serialisable:
        digest of the model, decoding. The prompt, the marker and the problems are added.
      batch_size: prompts per call, sorted by length, the shortest first.
      marker: precedes the answer, see `extract_answer`.
      on_batch: called at the start and after every batch with the numbers of answered and of correct
        problems.
    Returns: {"metric": share of correct answers, "metric_name": "accuracy", "standard_error": of that share,
      sqrt(metric (1 - metric) / n), "unanswered": answers without a number, "n": number of problems}.
    Raises: ValueError if the file is not a records file or has other settings, or another run is writing to
      it.
    """
    if batch_size < 1 or not problems:
        raise DarexError(f"need batch_size >= 1 and problems, got {batch_size} and {len(problems)} problems.")
    path = Path(records)
    header = _line({"settings": {**settings, **_protocol(problems, marker)}})
    prompts = [gsm8k_prompt(problem.question) for problem in problems]
    busy = f"another run is writing its answers to {path}; wait for it, or choose another file."
    with only_one(path, busy), path.open("ab") as file:
        found, size = _read_records(path, header, len(problems))
        left = sorted(set(range(len(problems))) - found.keys(), key=lambda i: (len(prompts[i]), i))
        file.truncate(size)
        if not size:
            _write_through(file, header)
        on_batch(len(found), _correct(found))
        for start in range(0, len(left), batch_size):
            batch = left[start : start + batch_size]
            completions = generate([prompts[i] for i in batch])
            if len(completions) != len(batch):
                raise DarexError(
                    f"generate returned {len(completions)} completions for {len(batch)} prompts."
                )
            new = {
                i: _record(i, problems[i], prompts[i], completion, marker)
                for i, completion in zip(batch, completions, strict=True)
            }
            _write_through(file, b"".join(map(_line, new.values())))
            found |= new
            on_batch(len(found), _correct(found))
    n, share = len(found), _correct(found) / len(found)
    return {
        "metric": share,
        "metric_name": "accuracy",
        "standard_error": math.sqrt(share * (1 - share) / n),
        "unanswered": sum(record["extracted"] is None for record in found.values()),
        "n": n,
    }


def _protocol(problems: Sequence[Problem], marker: str) -> dict[str, Any]:
    asked = json.dumps([(problem.question, str(problem.answer)) for problem in problems])
    digest = hashlib.sha256(asked.encode()).hexdigest()
    return {"prompt": PROMPT, "marker": marker, "problems": len(problems), "problems_sha256": digest}


def _record(index: int, problem: Problem, prompt: str, completion: str, marker: str) -> dict[str, Any]:
    extracted = extract_answer(completion, marker)
    return {
        "index": index,
        "prompt": prompt,
        "completion": completion,
        "extracted": None if extracted is None else str(extracted),
        "gold": str(problem.answer),
        "correct": extracted == problem.answer,
    }


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"  # ASCII, so that incomplete characters of a model survive


def _write_through(file: Any, content: bytes) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def _correct(records: Mapping[int, Mapping[str, Any]]) -> int:
    return sum(record["correct"] for record in records.values())


def _read_records(path: Path, header: bytes, count: int) -> tuple[dict[int, dict[str, Any]], int]:
    """Reads the records of an existing file.

    Args: header: the expected first line; count: the number of problems.
    Returns: the records by index, and the size in bytes up to the end of the last complete line, 0 for a new
      file.
    Raises: ValueError for other settings, a file of another kind or a damaged line.
    """
    content = read_bytes(path) if path.exists() else b""
    if header.startswith(content):  # empty, an incomplete header, or only a header
        return {}, len(content) if content == header else 0
    size = content.rfind(b"\n") + 1
    first, *lines = content[:size].splitlines() or [b""]
    _check_settings(path, first, header)
    records: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=2):
        try:
            record = json.loads(line)
            index, _ = record["index"], record["extracted"]
            if not isinstance(record["correct"], bool):
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            raise DarexError(f"{path}: line {number} is damaged; delete the line or the file.") from error
        if index not in range(count) or index in records:
            raise DarexError(f"{path}: line {number}: duplicate or out-of-range index {index}; delete it.")
        records[index] = record
    return records, size


def _check_settings(path: Path, first: bytes, header: bytes) -> None:
    here = json.loads(header)["settings"]
    try:
        there = json.loads(first)["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise DarexError(f"{path} is not a file of GSM8K records; choose another file.") from error
    for name in {**there, **here}:
        if there.get(name) != here.get(name):
            raise DarexError(
                f"{path} was written with other settings: {name} is {there.get(name)!r} there and "
                f"{here.get(name)!r} here. Choose another file, or delete this one to start over."
            )
