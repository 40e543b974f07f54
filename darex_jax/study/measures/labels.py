"""Rivals of a pruned delta: as many bytes, trained from the pretrained model with labels.

LoRA on every linear layer (arXiv:2106.09685), and the values of a random subspace (arXiv:1804.08838), whose
places a key defines. A step costs about what a step of the fine-tune costs.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.core.delta import apply_delta
from darex_jax.core.errors import DarexError
from darex_jax.core.scope import choose_scope
from darex_jax.core.tree import combine, flatten_names, seed_key, unflatten_names
from darex_jax.files.checkpoint import Checkpoint, save_params
from darex_jax.files.model import load_model
from darex_jax.files.prune import Job, PruneSummary, prune_parts
from darex_jax.methods.budget import Budget, TooSmall
from darex_jax.methods.dare import dare
from darex_jax.models import Model
from darex_jax.models.lora import attach_adapters
from darex_jax.parts.low_rank import LowRank
from darex_jax.parts.random import Random
from darex_jax.parts.rounding import rounded
from darex_jax.parts.total import Parts
from darex_jax.parts.values import Shape, Values
from darex_jax.runs.prune import fit_to_size, pruned_entries
from darex_jax.study.fine_tunes import RECIPE, Place
from darex_jax.study.plan import FineTune
from darex_jax.tasks import TASKS, load_task
from darex_jax.tasks.batching import encode, load_tokenizer
from darex_jax.training import fine_tune as training
from darex_jax.training.loop import Recipe, StepRecord

LEARNING_RATE = 2e-4  # of a dense delta, as in `distill`: divided by the density, for factors by its root
FILLED = 0.97  # of the bytes allowed: trained values are coded a little worse than the normal ones of a trial
OPTIONS = {"support", "rank", "bits"}
HEAD, LAYER, VALUES = "classifier.", ".layer.", "values"
Params = dict[str, Any]


class Trained(NamedTuple):
    """Attributes:
    config: of the model, for its file.
    params: the pretrained model's, with the trained head.
    parts: float32, by parameter.
    """

    config: dict[str, Any]
    params: Params
    parts: dict[str, Parts]


@dataclass(frozen=True, eq=False)
class Scattered:
    """A model whose matrices get trained values added at fixed places; `params` has them under "values".

    Attributes: places: flat indices by parameter; rate: what the values are multiplied by.
    """

    model: Model
    places: Mapping[str, np.ndarray]
    rate: float

    def __call__(self, params: Params, *inputs: Any, **options: Any) -> Any:
        named = flatten_names({name: tree for name, tree in params.items() if name != VALUES})
        for name, values in flatten_names(params[VALUES]).items():
            flat = named[name].reshape(-1).at[self.places[name]].add(
                values * self.rate, indices_are_sorted=True, unique_indices=True
            )  # fmt: skip
            named[name] = flat.reshape(named[name].shape)
        return self.model(unflatten_names(named), *inputs, **options)


def rivals(
    fine_tune: FineTune, base: Path, fine: Path, place: Place
) -> Callable[[Mapping[str, Any], int | None, Path], PruneSummary]:
    """A function from a way's options, the bytes allowed and a path to the artifact it writes there.

    Options: support, "lora" or "random"; bits of the values, which are rounded after the training (None is
    bfloat16); rank of LoRA, which is 1. LoRA has the size that its rank gives; a random subspace has as many
    values as the bytes hold. A training is the fine-tune's steps on all of its labels with AdamW, without
    weight decay; a model is trained once for all its bits.

    The function raises: TooSmall if the file is larger than the bytes allow; DarexError for other options,
      drop rates, or a task without labels.
    """
    known: dict[Any, Trained] = {}

    def write(told: Mapping[str, Any], allowed: int | None, path: Path) -> PruneSummary:
        options = {"rank": 1, "bits": None} | dict(told)
        if set(options) != OPTIONS or options["support"] not in ("lora", "random"):
            raise DarexError('labels has support = "lora" or "random", and bits; lora also has a rank.')
        if allowed is None:
            raise DarexError("labels is measured at bytes, not at drop rates.")
        lora, bits = options["support"] == "lora", options["bits"]
        size: Any = options["rank"] if lora else _density(base, fine, allowed, bits, fine_tune.seed)
        if (lora, size) not in known:
            start = _Start(fine_tune, base, place)
            known[lora, size] = start.lora(size) if lora else start.subspace(size)
        trained = known[lora, size]
        parts = {name: rounded(each, bits) for name, each in trained.parts.items()}
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "model"
            save_params(whole, apply_delta(trained.params, parts), trained.config, companions_from=base)
            with Checkpoint(base) as b, Checkpoint(whole) as f:
                found = _write(_job(b, f, path), parts, allowed, options, fine_tune.seed)
        if found.file_bytes > allowed:
            raise TooSmall(f"the file has {found.file_bytes:,} bytes, {allowed:,} are allowed.")
        return found

    return write


class _Start:
    """A classifier before its training: the pretrained model's parameters and a fresh head."""

    def __init__(self, fine_tune: FineTune, base: Path, place: Place) -> None:
        if fine_tune.task not in TASKS:
            raise DarexError(f"{fine_tune.task} has no labels to train on.")
        self.of, self.place, self.key = fine_tune, place, seed_key(fine_tune.seed)
        task = load_task(fine_tune.task, place.data_dir, fine_tune.seed)
        body, known = load_model(base)
        self.model, self.params = training.classifier_for(task, body, known, jax.random.fold_in(self.key, 0))
        texts = task.train.select(slice(fine_tune.options.get("limit")))
        self.train = encode(load_tokenizer(base), texts)
        named = flatten_names(self.params)
        self.head = {name: leaf for name, leaf in named.items() if name.startswith(HEAD)}
        self.frozen = {name: leaf for name, leaf in named.items() if name not in self.head}
        self.shapes = _linear({name: np.shape(leaf) for name, leaf in named.items()})

    def lora(self, rank: int) -> Trained:
        """A uniform within 1 / sqrt(in), B zero; the model's scale has the rate that both are trained at."""
        numbers = rank * sum(map(sum, self.shapes.values()))
        rate = 1 / math.sqrt(numbers / sum(map(math.prod, self.shapes.values())))
        factors: dict[str, jax.Array] = {}
        for i, (name, (out, width)) in enumerate(self.shapes.items()):
            layer, key = name.removesuffix(".weight"), jax.random.fold_in(self.key, 2 + i)
            a = jax.random.uniform(key, (rank, width), minval=-1, maxval=1) * width**-0.5
            factors |= {f"{layer}.lora_A.weight": a / rate, f"{layer}.lora_B.weight": jnp.zeros((out, rank))}
        model = attach_adapters(self.model, unflatten_names(factors), rate**2)
        found = flatten_names(self._trained(model, factors))

        def part(name: str, shape: Shape) -> Parts:
            layer, one = name.removesuffix(".weight"), np.asarray(np.float32(1))
            b, a = (Values(found.pop(f"{layer}.lora_{factor}.weight") * rate) for factor in "BA")
            return Parts((LowRank(b, a, one, shape),), shape)

        parts = {name: part(name, shape) for name, shape in self.shapes.items()}
        return self._with(unflatten_names(found), parts)

    def subspace(self, density: float) -> Trained:
        """The entries that a key draws, all zero at first."""
        drawn, rate = _subspace(self.shapes, density, self.of.seed), 1 / density
        places = {name: np.asarray(part.located().positions) for name, part in drawn.items()}
        begun = {f"{VALUES}.{name}": jnp.zeros(len(own)) for name, own in places.items()}
        found = self._trained(Scattered(self.model, places, rate), begun)
        values = flatten_names(found.pop(VALUES))
        parts = {
            name: Parts((replace(part, values=Values(values[name] * rate)),), part.shape)
            for name, part in drawn.items()
        }
        return self._with(found, parts)

    def _with(self, head: Params, parts: dict[str, Parts]) -> Trained:
        return Trained(self.model.config.to_hf(), combine(self.params, head), parts)

    def _trained(self, model: Callable[..., Any], begun: Mapping[str, jax.Array]) -> Params:
        told = {name: value for name, value in self.of.options.items() if name in RECIPE}
        told |= {"learning_rate": LEARNING_RATE, "optimizer": "adamw", "weight_decay": 0.0, "remat": False}
        recipe = Recipe(**told)
        steps = recipe.total_steps(len(self.train))

        def on_step(record: StepRecord) -> None:
            line = {name: value for name, value in record._asdict().items() if value is not None}
            self.place.on_step(steps, line)

        self.place.say(f"training a rival of {self.of.name} with labels")
        trained, _ = training.fine_tune(
            model, unflatten_names(self.head | dict(begun)), self.train, recipe,
            key=jax.random.fold_in(self.key, 1), frozen=unflatten_names(self.frozen), pretrained={},
            on_step=on_step,
        )  # fmt: skip
        return trained


def _linear(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Those of the linear maps inside the layers."""
    return {name: shape for name, shape in shapes.items() if LAYER in name and len(shape) == 2}


def _subspace(shapes: Mapping[str, Shape], density: float, seed: int) -> dict[str, Random]:
    """Random parts whose values are zero."""
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    drawn = dare(zeros, Budget(drop_rate=1 - density), key=seed_key(seed), q=1.0, dtype=jnp.float32)
    return {name: each.parts[0] for name, each in drawn.items()}


def _density(base: Path, fine: Path, allowed: int, bits: int | None, seed: int) -> float:
    """Of how many entries a file of so many bytes holds the values; found with random ones."""
    rng = np.random.default_rng(seed)
    with Checkpoint(base) as b, Checkpoint(fine) as f, tempfile.TemporaryDirectory() as folder:
        shapes = _linear(f.shapes)
        densities: dict[Path, float] = {}

        def of_size(room: float, path: Path) -> PruneSummary:
            densities[path] = min(1.0, 8 * room / (bits or 16) / sum(map(math.prod, shapes.values())))
            parts = {}
            for name, part in _subspace(shapes, densities[path], seed).items():
                values = Values(rng.standard_normal(len(part.values), np.float32))
                parts[name] = rounded(Parts((replace(part, values=values),), part.shape), bits)
            return _write(_job(b, f, path), parts, allowed, {"support": "random", "bits": bits}, seed)

        _, path = fit_to_size(of_size, round(FILLED * allowed), Path(folder))
        return densities[path]


def _job(base: Checkpoint, fine: Checkpoint, path: Path) -> Job:
    return Job(base, fine, path, choose_scope(fine.config.get("model_type"), shapes=fine.shapes))


def _write(
    job: Job, parts: Mapping[str, Parts], allowed: int, options: Mapping[str, Any], seed: int
) -> PruneSummary:
    def make_parts(deltas: dict[str, np.ndarray]) -> dict[str, Parts]:
        return {name: parts.get(name, Parts((), np.shape(delta))) for name, delta in deltas.items()}

    budget = {"bytes_per_parameter": allowed / pruned_entries(job)}
    made_by = {
        "method": "labels", "key": (0, seed), "budget": budget,
        "options": {name: value for name, value in options.items() if value is not None}, "evidence": {},
    }  # fmt: skip
    return prune_parts(job, make_parts, leafwise=False, made_by=made_by)
