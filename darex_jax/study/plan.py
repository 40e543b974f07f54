"""A study as it is declared: a TOML file says what is fine-tuned, pruned and measured, at each scale.

`fine_tunes.toml`, beside the studies, declares models, trainings and optimizers once; a study names them.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from darex_jax.choosing.choice import Choice
from darex_jax.core.errors import DarexError, FileError
from darex_jax.files.paths import read_text
from darex_jax.merging.table import MERGES
from darex_jax.methods.table import METHODS

SCALES = ("small", "paper")
FINE_TUNES = "fine_tunes.toml"
MEASURES: dict[str, set[str]] = {  # files of `study/measures/`, and the options of their ways
    "methods": {
        *("method", "q", "block_wise", "texts", "steps", "include"),
        *("support", "bits", "rank", "dtype", "per", "group"),
    },
    "q": {*vars(Choice()), "walk", "slow", "limit"},
    "delta": set(),
    "merging": {"method", "q", "drop_rate", "outliers", "window"},
    "lora": {"pruned", "q"},
}
NEEDED = {  # the option that every way of a measure has, and its values
    "methods": ("method", (*METHODS, "labels")), "merging": ("method", tuple(MERGES)),
    "lora": ("pruned", ("merged", "factors")),
}  # fmt: skip
NUMBER = (int, float)
HEAD = {"title", "source", "measure", "text", "claims", *SCALES}
SETTINGS = {
    "train", "optimizers", "seeds", "ways", "drop_rates", "bytes", "masks", "test_examples", "sets",
}  # fmt: skip
CLAIM = {
    "claim", "source", "better", "than", "at", "keeps", "keeps_gain", "way", "optimizers", "value", "least",
    "untestable",
}  # fmt: skip


@dataclass(frozen=True)
class FineTune:
    """A fine-tuned model by what makes it.

    Attributes:
      training, optimizer: their names in `fine_tunes.toml`; seed: of the training.
      model: name of the pretrained model; source: its table in `fine_tunes.toml`; start: the fine-tuned model
        that it is, if it is one.
      task: what it is trained on; options: the other arguments of `train_run`, the recipe's among them.
    """

    training: str
    optimizer: str
    seed: int
    model: str
    source: Mapping[str, Any]
    task: str
    options: Mapping[str, Any]
    start: FineTune | None = None

    @property
    def name(self) -> str:
        """`sst2/adamw/0`."""
        return f"{self.training}/{self.optimizer}/{self.seed}"


@dataclass(frozen=True)
class Plan:
    """A study at one scale.

    Attributes:
      name: of its file; title, source, text: for people; the source is the table or figure it reproduces.
      measure: one of `MEASURES`; fine_tunes: what is measured.
      ways: options by the name of a row; at: drop rates or bytes per parameter, by `axis`.
      masks: how many, of the seeds from 0 on; test_examples: at most so many, of the official validation
        split.
      sets: of trainings that are merged.
      claims: tables of `CLAIM`.
      folder: where the file is.
    """

    name: str
    scale: str
    title: str
    source: str
    text: str
    measure: str
    fine_tunes: Sequence[FineTune]
    ways: Mapping[str, Mapping[str, Any]]
    axis: str
    at: Sequence[float]
    masks: int
    test_examples: int
    sets: Sequence[Sequence[str]]
    claims: Sequence[Mapping[str, Any]]
    folder: Path = field(compare=False)

    @property
    def file(self) -> Path:
        """Where its rows are: `results/SCALE/NAME.jsonl` beside the study."""
        return self.folder / "results" / self.scale / f"{self.name}.jsonl"


class NoScale(FileError):
    """A study that is not declared at a scale."""


def find_studies(folder: Path) -> list[str]:
    """The names of the studies in a folder."""
    return sorted(path.stem for path in folder.glob("*.toml") if path.name != FINE_TUNES)


def read_plan(folder: Path, name: str, scale: str) -> Plan:
    """Reads `FOLDER/NAME.toml` at one of its scales.

    Raises: FileError for a file that is missing, is not TOML, or has an unknown or missing entry.
    """
    path = folder / f"{name}.toml"
    if not path.exists():
        found = ", ".join(find_studies(folder)) or "none"
        raise FileError(f"{path}: there is no such study; in {folder} there are: {found}.")
    study = _read(path, HEAD, needed=("title", "measure"))
    if scale not in study:
        there = ", ".join(name for name in SCALES if name in study)
        raise NoScale(f"{path}: has no scale [{scale}]; it has {there}.")
    for each in filter(study.__contains__, SCALES):
        _known(path, study[each], SETTINGS, f"[{each}]")
    for head in ("title", "source", "text"):
        if not isinstance(study.get(head, ""), str):
            raise FileError(f"{path}: {head} is a text, got {study[head]!r}.")
    _check_list(path, "claims are tables, [[claims]]", study.get("claims", []), dict)
    own = study[scale]
    if study["measure"] not in list(MEASURES):  # a list: TOML has values without a hash
        raise FileError(f"{path}: measure is one of {', '.join(MEASURES)}, got {study['measure']!r}.")
    _check_settings(path, own, study["measure"])
    for claim in study.get("claims", ()):
        _check_claim(path, claim, {way for each in SCALES for way in study.get(each, {}).get("ways", ())})
    declared = read_fine_tunes(folder, scale)
    wanted = product(own.get("train", ()), own.get("optimizers", ("adamw",)), own.get("seeds", (0,)))
    axes = [axis for axis in ("drop_rates", "bytes") if axis in own]
    if len(axes) > 1:
        raise FileError(f"{path}: [{scale}] has drop_rates or bytes, not both.")
    return Plan(
        name=name, scale=scale, title=study["title"], source=study.get("source", ""),
        text=study.get("text", ""), measure=study["measure"],
        fine_tunes=[declared(path, *each) for each in wanted],
        ways=own.get("ways", {}), axis=axes[0] if axes else "", at=own.get(axes[0], ()) if axes else (),
        masks=own.get("masks", 4), test_examples=own.get("test_examples", 500), sets=own.get("sets", ()),
        claims=study.get("claims", ()), folder=folder,
    )  # fmt: skip


def read_fine_tunes(folder: Path, scale: str) -> Any:
    """A function from a study's path, a training, an optimizer and a seed to the `FineTune`."""
    path = folder / FINE_TUNES
    tables = _read(path, set(SCALES))
    if scale not in tables:
        raise FileError(f"{path}: has no scale [{scale}].")
    own = tables[scale]
    _known(path, own, {"models", "train", "optimizers"}, f"[{scale}]")
    for kind, entries in own.items():
        named = entries.items() if isinstance(entries, dict) else [("", None)]
        if wrong := [name for name, entry in named if not isinstance(entry, dict) or "/" in name]:
            raise FileError(
                f"{path}: {scale}.{kind} is a table of tables, whose names have no slash; see {wrong[0]!r}."
            )

    def declared(study: Path, training: str, optimizer: str, seed: int, of: tuple[str, ...] = ()) -> FineTune:
        if training in of:
            raise FileError(f"{path}: {' -> '.join((*of, training))} begins with itself.")
        for kind, name in (("train", training), ("optimizers", optimizer)):
            if name not in own.get(kind, {}):
                known = ", ".join(own.get(kind, {}))
                raise FileError(f"{study}: {path} declares no {scale}.{kind}.{name}; it has {known}.")
        options = dict(own["train"][training]) | own["optimizers"][optimizer]
        model, task = options.pop("model", None), options.pop("task", None)
        if model not in list(own.get("models", {})) or task is None:  # a list, as for measures
            raise FileError(
                f"{path}: {scale}.train.{training} needs a task, and a model of [{scale}.models]."
            )
        source = own["models"][model]
        begun = source.get("train")
        start = None
        if begun is not None:
            start = declared(study, begun, source.get("optimizer", "adamw"), 0, (*of, training))
        return FineTune(training, optimizer, seed, model, source, task, options, start)

    return declared


def _check_settings(path: Path, own: Mapping[str, Any], measure: str) -> None:
    """Raises: FileError for a setting of another type than a study needs, or for a column that it lacks."""
    lists: dict[str, Any] = {
        "train": str,
        "optimizers": str,
        "seeds": int,
        "drop_rates": NUMBER,
        "bytes": NUMBER,
        "sets": list,
    }
    for name, kind in lists.items():
        _check_list(path, f"{name} is a list, {name} = [...]", own.get(name, []), kind)
    for names in own.get("sets", []):
        _check_list(path, "sets are lists of trainings", names, str)
    if wrong := [seed for seed in own.get("seeds", []) if seed < 0]:
        raise FileError(f"{path}: seeds are 0 or more, got {wrong[0]}.")
    if wrong := [rate for rate in own.get("drop_rates", []) if not 0 <= rate < 1]:
        raise FileError(f"{path}: drop rates are at least 0 and below 1, got {wrong[0]}.")
    if wrong := [size for size in own.get("bytes", []) if not 0 < size < math.inf]:
        raise FileError(f"{path}: bytes per parameter are positive, got {wrong[0]}.")
    for name in ("masks", "test_examples"):
        if type(own.get(name, 1)) is not int or own.get(name, 1) < 1:
            raise FileError(f"{path}: {name} is a positive integer, got {own[name]!r}.")
    ways = own.get("ways", {})
    if not isinstance(ways, dict) or not ways or not all(isinstance(way, dict) for way in ways.values()):
        raise FileError(f"{path}: ways is a table of one or more tables, each with the options of a way.")
    columns = own.get("bytes", own.get("drop_rates"))
    if columns is None and measure in ("methods", "q"):
        raise FileError(f"{path}: the measure {measure} needs bytes = [...] or drop_rates = [...].")
    for name, way in ways.items():
        _known(path, way, MEASURES[measure] | {"at"}, f"the way {name!r}")
        option, values = NEEDED.get(measure, ("", ()))
        if values and way.get(option) not in values:
            raise FileError(
                f"{path}: {option} of {name!r} is one of {', '.join(values)}, got {way.get(option)!r}."
            )
        at = way.get("at", [])
        _check_list(path, f"at of {name!r} is a list of numbers", at, NUMBER)
        if other := [each for each in at if columns is not None and each not in columns]:
            raise FileError(f"{path}: at of {name!r} has {other[0]}, which is no column of the study.")


def _check_claim(path: Path, claim: Any, ways: set[str]) -> None:
    """Raises: FileError for a claim of no known form, or about a way that the study does not have."""
    _known(path, claim, CLAIM, "a claim")
    forms = ({"better", "than"}, {"keeps", "way", "at"}, {"keeps_gain", "way", "at"}, {"untestable"},
             {"least", "value", "way", "at"})  # fmt: skip
    if "claim" not in claim or not any(form <= claim.keys() for form in forms):
        raise FileError(
            f"{path}: a claim has a text, claim = ..., and better and than, or keeps, keeps_gain or least "
            f"with way and at, or untestable; got {', '.join(claim)}."
        )
    _check_list(path, "at of a claim is a list of numbers", claim.get("at", []), NUMBER)
    for name, value in claim.items():
        is_number = name in ("keeps", "keeps_gain", "least")
        if name not in ("at", "optimizers") and not isinstance(value, NUMBER if is_number else str):
            raise FileError(
                f"{path}: {name} of a claim is a {'number' if is_number else 'text'}, got {value!r}."
            )
    _check_list(path, "optimizers of a claim is a list of names", claim.get("optimizers", []), str)
    named = [claim["way"]] if "way" in claim else [claim[key] for key in ("better", "than") if key in claim]
    if unknown := [way for way in named if way not in ways]:
        raise FileError(f"{path}: a claim names {unknown[0]!r}; the ways are {', '.join(sorted(ways))}.")


def _check_list(path: Path, rule: str, value: Any, kind: Any) -> None:
    """Raises: FileError with the rule unless it is a list of this kind."""
    right = isinstance(value, list) and not any(isinstance(each, bool) for each in value)
    if not right or not all(isinstance(each, kind) for each in value):
        raise FileError(f"{path}: {rule}, got {value!r}.")


def _read(path: Path, known: set[str], needed: Sequence[str] = ()) -> dict[str, Any]:
    try:
        found = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise FileError(f"{path}: is not TOML: {error}.") from error
    _known(path, found, known, "the file")
    for name in needed:
        if name not in found:
            raise FileError(f"{path}: lacks {name}.")
    return found


def _known(path: Path, table: Any, known: set[str], what: str) -> None:
    if not isinstance(table, dict):
        raise FileError(f"{path}: {what} is not a table.")
    if unknown := sorted(table.keys() - known):
        raise FileError(
            f"{path}: unknown {', '.join(unknown)} in {what}; it may have {', '.join(sorted(known))}."
        )


def chosen(plan: Plan, only: str | None) -> Sequence[FineTune]:
    """The fine-tunes whose names contain `only`, or all. Raises: DarexError if neither they nor a way do."""
    found = [each for each in plan.fine_tunes if only is None or only in each.name]
    sets = any(only in "+".join(names) for names in plan.sets) if only is not None else False
    if only is not None and not found and not sets and not any(only in way for way in plan.ways):
        names = ", ".join(each.name for each in plan.fine_tunes)
        raise DarexError(
            f"--only {only}: matches no way and no fine-tune of {plan.name}; these are: {names}."
        )
    return found
