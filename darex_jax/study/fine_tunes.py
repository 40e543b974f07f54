"""The fine-tuned models of a study, trained once: a folder's name is the digest of what made its model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import jax

from darex_jax.core.errors import DarexError, FileError
from darex_jax.files.checkpoint import Checkpoint, save_params
from darex_jax.files.manifest import weights_digest
from darex_jax.models import init_model, read_model_config
from darex_jax.runs.demo import demo_weights
from darex_jax.runs.train import train_run
from darex_jax.study.plan import FineTune
from darex_jax.study.rows import digest_of
from darex_jax.tasks.splits import edition
from darex_jax.tasks.word_problems import word_problem_tokenizer
from darex_jax.training.loop import Recipe

RECIPE = {each.name for each in dataclasses.fields(Recipe)}
TRAINING = {name for name, each in signature(train_run).parameters.items() if each.kind is each.KEYWORD_ONLY}
MODEL = {"package", "config", "train", "optimizer"}
PACKAGES = ("minilm",)


class Place(NamedTuple):
    """Attributes: runs: where fine-tuned models are kept; models: a folder of Hugging Face directories, by
    the names in `fine_tunes.toml`; data_dir: see `load_task`; say, on_step: see `train_run`.
    """

    runs: Path
    models: Path | None = None
    data_dir: Path | None = None
    say: Callable[[str], None] = lambda line: None
    on_step: Callable[[int, dict[str, Any]], None] = lambda steps, line: None


def base_of(fine_tune: FineTune, place: Place) -> Path:
    """The directory of the pretrained model.

    `train`: a fine-tuned model, which is trained first; `package`: that of an installed package; `config`:
    random weights of this config, from key 0; else `models`/NAME.

    Raises: DarexError saying where it is looked for.
    """
    source = fine_tune.source
    if unknown := sorted(source.keys() - MODEL):
        raise DarexError(
            f"model {fine_tune.model}: unknown {', '.join(unknown)}; it may have package, config, train."
        )
    if fine_tune.start is not None:
        return obtain(fine_tune.start, place)[1]
    if source.get("package") in PACKAGES:
        return demo_weights()
    found = None if place.models is None else place.models / fine_tune.model
    if found is not None and found.is_dir():
        return found
    if "config" in source:
        return random_base(source["config"], place.runs / "models")
    looked = "--models FOLDER" if found is None else str(found)
    raise DarexError(f"model {fine_tune.model}: not there; put its Hugging Face directory at {looked}.")


def random_base(config: Mapping[str, Any], folder: Path) -> Path:
    """A model of random weights, with the tokenizer of the generated word problems; made once."""
    tokenizer = word_problem_tokenizer()
    words = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id,
             "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    whole = words | dict(config)
    out = folder / f"random-{digest_of(whole)}"
    if not (out / "tokenizer_config.json").exists():
        model, params = init_model(read_model_config(whole), jax.random.key(0))
        save_params(out, params, model.config.to_hf(), overwrite=True)
        tokenizer.save_pretrained(out)
    return out


def made_from(fine_tune: FineTune, base: Path) -> dict[str, Any]:
    """What the bits of a fine-tuned model follow from, on one kind of processor."""
    with Checkpoint(base) as checkpoint:
        digest = weights_digest(checkpoint)
    told = {"task": fine_tune.task, "seed": fine_tune.seed, **fine_tune.options, **edition(fine_tune.task)}
    return {"base": digest, **told}


def obtain(fine_tune: FineTune, place: Place) -> tuple[Path, Path]:
    """Base and fine-tuned model; trained if it is not there, resumed if it was interrupted.

    Raises: as `train_run`; FileError for an option that no training has.
    """
    options = dict(fine_tune.options)
    if unknown := sorted(options.keys() - RECIPE - TRAINING):
        raise FileError(f"fine_tunes.toml: {fine_tune.training}: no training has {', '.join(unknown)}.")
    base = base_of(fine_tune, place)
    digest = digest_of(made_from(fine_tune, base))
    folder = place.runs / f"{fine_tune.name.replace('/', '-')}-{digest}"
    out = folder / "fine-tuned"
    if not any((out / name).exists() for name in ("config.json", "adapter_config.json")):
        recipe = {name: options.pop(name) for name in RECIPE & options.keys()}
        place.say(f"training {fine_tune.name}")
        train_run(
            base, out, Recipe(**recipe), task=fine_tune.task, data_dir=place.data_dir, seed=fine_tune.seed,
            say=place.say, on_step=place.on_step, **options,
        )  # fmt: skip
    return base, out
