"""`darex generate`: continues a prompt with a model or its deltas."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from darex_jax.cli.options import (
    ALLOW_CHANGED_FILES,
    BESIDE,
    DELTAS,
    DTYPE,
    IGNORE,
    JSON,
    SEED,
)
from darex_jax.cli.show import plain, say_if_large
from darex_jax.cli.stores import PATH
from darex_jax.core.errors import DarexError

if TYPE_CHECKING:
    from darex_jax.tasks.opening import Opened


@click.command()
@click.argument("model", type=PATH)
@click.argument("prompt")
@DELTAS
@BESIDE
@ALLOW_CHANGED_FILES
@click.option("--max-new-tokens", default=256, show_default=True, type=click.IntRange(1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0),
              help="0 is greedy decoding.")  # fmt: skip
@click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text.")
@click.option("--chat", is_flag=True, help="Format PROMPT as a user message with the model's chat template.")
@DTYPE
@IGNORE
@SEED
@JSON
def generate(
    model: Path,
    prompt: str,
    deltas: tuple[Path, ...],
    beside: bool,
    allow_changed_files: bool,
    max_new_tokens: int,
    temperature: float,
    stop: tuple[str, ...],
    chat: bool,
    dtype: str | None,
    ignore_config_fields: tuple[str, ...],
    seed: int,
    as_json: bool,
) -> None:
    """Continue PROMPT, with streamed output.

    MODEL is the Hugging Face directory of a decoder; with --delta, of the base. With several deltas the texts
    are shown when all have ended.
    """
    import jax

    from darex_jax.evaluation.text import stream_text

    if beside and not deltas:
        raise click.UsageError("--beside needs --delta.")
    if len(deltas) > 1 or beside:
        if dtype:
            raise DarexError("--dtype supports only one --delta, without --beside.")
        from darex_jax.runs.many import open_many, write_many

        many = open_many(
            model, deltas, allow_changed_files=allow_changed_files, ignore_config_fields=ignore_config_fields
        )
        begun = time.monotonic()
        asked = as_chat(model, many.tokenizers[many.bank.names[0]], prompt) if chat else prompt
        texts = write_many(
            many, asked, max_new_tokens=max_new_tokens, stop=stop, key=jax.random.key(seed),
            temperature=temperature,
        )  # fmt: skip
        if as_json:
            found = {"deltas": list(map(str, deltas)), "texts": list(texts.values())}
            head = {"model": str(model), "prompt": asked, "seconds": _since(begun)}
            click.echo(json.dumps(head | found))
        for name, text in {} if as_json else texts.items():
            click.secho(plain(name), bold=True)
            click.echo(text)
        return
    delta = next(iter(deltas), None)
    say_if_large("generate", model)
    loaded, params, tokenizer, ends = open_text_model(
        model,
        dtype,
        delta=delta,
        allow_changed_files=allow_changed_files,
        ignore_config_fields=ignore_config_fields,
    )
    if chat:
        prompt = as_chat(model, tokenizer, prompt)
    begun, pieces = time.monotonic(), []
    for piece in stream_text(
        loaded,
        params,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        key=jax.random.key(seed),
        temperature=temperature,
        stop=stop,
    ):
        pieces.append(piece)
        if not as_json:
            click.echo(piece, nl=False)
    text = "".join(pieces)
    if as_json:
        report = {"model": str(model), "delta": None if delta is None else str(delta), "prompt": prompt}
        click.echo(json.dumps(report | {"text": text, "seconds": _since(begun)}))
    else:
        click.echo()


def as_chat(model: Path, tokenizer: Any, prompt: str) -> str:
    """The prompt as a user message, formatted with the model's chat template."""
    if not tokenizer.chat_template:
        raise DarexError(f"{model}: its tokenizer has no chat template; leave out --chat.")
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _since(begun: float) -> float:
    return round(time.monotonic() - begun, 2)


def open_text_model(model: Path, dtype: str | None, **options: Any) -> "Opened":
    """`open_model` for a decoder. Raises: DarexError for other models."""
    from darex_jax.models import DecoderConfig
    from darex_jax.tasks.opening import open_model

    opened = open_model(model, dtype, **options)
    if not isinstance(opened.model.config, DecoderConfig):
        raise DarexError(f"{model}: a {opened.model.config.model_type} model does not generate text.")
    return opened
