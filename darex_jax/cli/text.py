"""`darex generate` continues a prompt with a model or its deltas; `darex sample` has a model write texts."""

import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from darex_jax.cli.options import (
    ALLOW_CHANGED_FILES,
    BESIDE,
    DATA,
    DATA_DIR,
    DELTAS,
    DIFFICULTY,
    DTYPE,
    IGNORE,
    JSON,
    SEED,
    check_data_dir,
    check_difficulty,
    take_table,
)
from darex_jax.cli.show import plain, print_table, say_if_large, text_bar
from darex_jax.cli.stores import OUT, PATH, as_given
from darex_jax.core.errors import DarexError

if TYPE_CHECKING:
    from darex_jax.tasks.opening import Opened

SHOWN = 200  # characters of the first text


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
    from darex_jax.core.tree import seed_key
    from darex_jax.evaluation.text import stream_text

    if beside and not deltas:
        raise click.UsageError("--beside needs --delta.")
    if "" in stop:
        raise click.UsageError("--stop is a text, not nothing.")
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
            many, asked, max_new_tokens=max_new_tokens, stop=stop, key=seed_key(seed),
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
        key=seed_key(seed),
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


@click.command()
@click.argument("model", type=PATH)
@click.argument("out", type=OUT)
@click.option("--count", default=1000, show_default=True, type=click.IntRange(1), help="Number of texts.")
@click.option("--task", type=click.Choice(["gsm8k", "word-problems"]), help="Continue its prompts.")
@DATA_DIR
@DIFFICULTY
@click.option("--text", type=PATH, help="Continue prompts: a file with one per line, or a column of --data. "
              "Without any prompts whole texts are written.")  # fmt: skip
@DATA
@click.option("--chat", is_flag=True, help="Format prompts as user messages with the model's chat template.")
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(1))
@click.option("--temperature", default=1.0, show_default=True, type=click.FloatRange(0, min_open=True))
@DTYPE
@IGNORE
@SEED
@JSON
def sample(
    model: Path,
    out: Path,
    count: int,
    task: str | None,
    data_dir: Path | None,
    difficulty: int,
    text: Path | None,
    data: str | None,
    chat: bool,
    max_new_tokens: int,
    temperature: float,
    dtype: str | None,
    ignore_config_fields: tuple[str, ...],
    seed: int,
    as_json: bool,
) -> None:
    """Have a decoder write texts, for a method that trains.

    The texts continue prompts, in turn, and begin with them. OUT is a file of JSON lines, replaced if it
    exists, for darex prune --data OUT --text text.
    """
    from darex_jax.core.tree import seed_key
    from darex_jax.evaluation.text import sample_texts
    from darex_jax.files.paths import check_output
    from darex_jax.tasks.lines import write_texts
    from darex_jax.tasks.source import Source, read_prompts

    check_output(out)
    if out.suffix != ".jsonl":
        raise click.UsageError(f"OUT is a file of JSON lines: {out} must end in .jsonl.")
    check_difficulty(task)
    check_data_dir(task, data_dir)
    places: dict[str, Any] = {"data": data, "text": text}
    table = take_table(places)
    source = Source(task=task, data_dir=data_dir, difficulty=difficulty, text=places["text"], table=table)
    for given in (text, data):
        if given is not None and Path(given).resolve() == out.resolve():
            raise click.UsageError(f"OUT would replace the prompts of {given}; choose another path.")
    prompts = read_prompts(source)
    if chat and not prompts:
        raise click.UsageError("--chat formats prompts: pass --text, --data or --task.")
    say_if_large("sample", model)
    loaded, params, tokenizer, ends = open_text_model(model, dtype, ignore_config_fields=ignore_config_fields)
    if chat:
        prompts = [as_chat(model, tokenizer, prompt) for prompt in prompts]
    begun = time.monotonic()
    with text_bar(count, as_json) as on_texts:
        texts = sample_texts(
            loaded, params, tokenizer, count, prompts=prompts, max_new_tokens=max_new_tokens,
            eos_token_id=ends, key=seed_key(seed), temperature=temperature, on_texts=on_texts,
        )  # fmt: skip
    write_texts(out, texts)
    report = {
        "model": str(model), "out": as_given(str(out)), "texts": len(texts), "seed": seed,
        "distinct": len(set(texts)), "mean_length": round(sum(map(len, texts)) / len(texts), 1),
        "seconds": _since(begun),
    }  # fmt: skip
    if as_json:
        click.echo(json.dumps(report))
        return
    used = ["--method", "distilled", "--size", "100x", "--data", str(report["out"]), "--text", "text"]
    rows = [
        ("texts", f"{len(texts):,}, {report['distinct']:,} of them distinct"),
        ("length", f"{report['mean_length']} characters on average"),
        ("first", plain(texts[0])[:SHOWN]),
        ("use", shlex.join(["darex", "prune", "BASE", as_given(str(model)), "DELTA", *used])),
    ]
    print_table(str(report["out"]), rows)


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
