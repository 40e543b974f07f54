"""Accuracy on GSM8K or its generated twin; a record of every answer lets an interrupted run go on."""

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
    """Asks every problem zero-shot and compares the answers' numbers with the right ones, exactly.

    `records` is a file of JSON lines. The first holds the settings; each other line one answer: its problem's
    index, prompt, completion, extracted (the number as text, `7/2` say, or null), gold, correct. A batch's
    lines are on the disk before the next batch starts. Where the file exists, what it holds is kept, but for
    a last line broken off in the middle, and only the rest is asked.

    Args:
      problems: from `load_gsm8k` or `word_problems`.
      generate: from prompts to completions, one each, in the same order; decoding is its own affair.
      settings: what else decides the answers and is the same in every run that may share the file, ready for
        JSON: digest of the model, decoding. The prompt, the marker and the problems are added to it.
      batch_size: prompts of one call; neighbours in length go together, the shortest first.
      marker: what stands before the answer, see `extract_answer`.
      on_batch: called at the start and after every batch: how many are answered, and how many are correct.
    Returns: {"metric": share of correct answers, "metric_name": "accuracy", "standard_error": of that share,
      sqrt(metric (1 - metric) / n), "unanswered": answers without a number, "n": number of problems}.
    Raises: ValueError if the file holds something else or was written with other settings, or another run
      is writing to it.
    """
    if batch_size < 1 or not problems:
        raise DarexError(f"need batch_size >= 1 and problems, got {batch_size} and {len(problems)} problems.")
    path = Path(records)
    header = _line({"settings": {**settings, **_protocol(problems, marker)}})
    prompts = [gsm8k_prompt(problem.question) for problem in problems]
    busy = f"another run writes its answers into {path}; wait for it, or choose another file for these."
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
                raise DarexError(f"generate gave {len(completions)} completions for {len(batch)} prompts.")
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
    return json.dumps(value).encode() + b"\n"  # ASCII: even half a character that a model wrote is kept


def _write_through(file: Any, content: bytes) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def _correct(records: Mapping[int, Mapping[str, Any]]) -> int:
    return sum(record["correct"] for record in records.values())


def _read_records(path: Path, header: bytes, count: int) -> tuple[dict[int, dict[str, Any]], int]:
    """What a file holds already.

    Args: header: the first line it should have; count: the number of problems.
    Returns: the records by index, and the size in bytes up to the end of the last whole line, 0 for a file to
      begin.
    Raises: ValueError for other settings, another kind of file or a damaged line.
    """
    content = read_bytes(path) if path.exists() else b""
    if header.startswith(content):  # nothing, or a header broken off in the middle, or nothing but a header
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
            raise DarexError(f"{path}: line {number} has no business here, its index is {index}.")
        records[index] = record
    return records, size


def _check_settings(path: Path, first: bytes, header: bytes) -> None:
    here = json.loads(header)["settings"]
    try:
        there = json.loads(first)["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise DarexError(f"{path} is no file of GSM8K records; choose another name for them.") from error
    for name in {**there, **here}:
        if there.get(name) != here.get(name):
            raise DarexError(
                f"{path} was written with other settings: {name} is {there.get(name)!r} there and "
                f"{here.get(name)!r} here. Choose another file, or delete this one to begin anew."
            )
