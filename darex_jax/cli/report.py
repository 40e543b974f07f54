"""The command that makes a page: report."""

import json
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from darex_jax.cli.options import (
    ALLOW_CHANGED_FILES,
    DATA_DIR,
    IGNORE,
    JSON,
    LIMIT,
    PARAMS,
    TEXT,
    own_examples,
    take_table,
    with_params,
)
from darex_jax.cli.show import byte_bar, bytes_text, plain, say_if_large, tried_bar, warned
from darex_jax.cli.stores import HERE, OUT, PATH, as_given
from darex_jax.core.errors import DarexError


def _paths(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> tuple[Path | None, Path]:
    """Of one path OUT, of two RESULTS and OUT."""
    if not 1 <= len(given) <= 2:
        raise click.UsageError("give OUT.html, or RESULTS and OUT.html.", ctx)
    *before, out = given
    if not out.endswith((".html", ".htm")):
        raise click.UsageError(f"the page is an HTML file: OUT ends in .html, {out} does not.", ctx)
    return (HERE.convert(before[0], param, ctx) if before else None), OUT.convert(out, param, ctx)


@click.command()
@click.argument("paths", nargs=-1, metavar="[RESULTS] OUT.html", callback=_paths)
@click.option("--delta", type=PATH, help="A page on this delta instead of RESULTS.")
@click.option("--base", type=PATH, help="The base that --delta was made from.")
@click.option("--fine", type=PATH, help="The fine-tuned model: how near the delta is to the real one.")
@click.option("--task", help="Evaluate the base, the restored model and --fine: opinions (generated), cola, "
              "sst2, mrpc, stsb; of decoders gsm8k, word-problems, by the answers' tokens.")  # fmt: skip
@DATA_DIR
@TEXT
@own_examples
@LIMIT
@click.option("--overwrite", is_flag=True, help="Replace OUT.html if it exists.")
@ALLOW_CHANGED_FILES
@PARAMS
@IGNORE
@JSON
def report(
    paths: tuple[Path | None, Path],
    delta: Path | None,
    base: Path | None,
    fine: Path | None,
    task: str | None,
    data_dir: Path | None,
    text: Path | None,
    limit: int | None,
    overwrite: bool,
    allow_changed_files: bool,
    params: str | None,
    ignore_config_fields: tuple[str, ...],
    as_json: bool,
    **own: Any,
) -> None:
    """Make a page of results: one HTML file that loads nothing.

    RESULTS is the folder of a study's results. With --delta and --base the page is on that delta: layer by
    layer what is in it, where its bytes are and, with --task, --data or --text, how the restored model does.
    """
    from darex_jax.study.page import write_page

    results, out = paths
    if (results is None) == (delta is None):
        raise click.UsageError("a page is of RESULTS or of a --delta: say one.")
    if delta is None:
        of_delta = {
            "base": base,
            "fine": fine,
            "task": task,
            "data-dir": data_dir,
            "text": text,
            "limit": limit,
            **own,
        }
        if stray := next((name for name, value in of_delta.items() if value is not None), None):
            raise click.UsageError(f"--{stray} goes with --delta.")
    elif base is None:
        raise click.UsageError("--delta takes --base, the model that it was made from.")
    if out.exists() and not overwrite:
        raise DarexError(f"{out} exists; --overwrite replaces it.")
    if results is not None:
        from darex_jax.study.of_results import results_page

        page = results_page(results)
    else:
        assert delta is not None and base is not None
        said = {"task": task, "data-dir": data_dir, "text": text, **own, "limit": limit}
        examples = {**own, "text": text}
        table = take_table(examples)
        page = _of_delta(
            out, delta, with_params(params, base, *([fine] if fine is not None else [])), task, data_dir,
            examples["text"], table, limit, allow_changed_files, ignore_config_fields, said, as_json,
        )  # fmt: skip
    page = replace(page, facts=[(name, as_given(value)) for name, value in page.facts])
    write_page(page, out)
    size = out.stat().st_size
    if as_json:
        head = {"out": as_given(str(out)), "bytes": size, "title": page.title}
        click.echo(json.dumps({**head, "summary": list(page.summary), "warnings": warned()}))
        return
    for sentence in page.summary:
        click.echo(plain(sentence))
    click.echo(f"Written: {as_given(str(out))}, {bytes_text(size)}")


def _of_delta(
    out: Path,
    delta: Path,
    models: tuple[Path, ...],
    task: str | None,
    data_dir: Path | None,
    text: Path | None,
    table: Any,
    limit: int | None,
    allow_changed_files: bool,
    ignore_config_fields: tuple[str, ...],
    said: dict[str, Any],
    as_json: bool,
) -> Any:
    """The page on a delta. Args: models: the base and, if it is there, the fine-tuned one."""
    from darex_jax.files.artifact import DeltaFile
    from darex_jax.files.checkpoint import Checkpoint
    from darex_jax.files.stream import keep_inputs
    from darex_jax.study.leaves import page_bytes
    from darex_jax.study.of_delta import delta_page
    from darex_jax.tasks.source import Source

    base, fine = models[0], models[1] if len(models) > 1 else None
    source = None
    if any(x is not None for x in (task, text, table)):
        source = Source(task=task, data_dir=data_dir, text=text, table=table, limit=limit)
        say_if_large("eval", base)
    elif data_dir is not None or limit is not None:
        raise click.UsageError("--data-dir and --limit are of examples: give --task, --text or --data.")
    with ExitStack() as stack:
        checkpoints = [stack.enter_context(Checkpoint(model)) for model in models]
        file = stack.enter_context(DeltaFile(delta))
        keep_inputs(out, file, *checkpoints)
        total = page_bytes(checkpoints[0], file, checkpoints[1] if fine is not None else None)
    paths = {"delta": delta, "base": base, "fine": fine}
    options = [p for n, v in {**paths, **said}.items() if v is not None for p in (f"--{n}", str(v))]
    with byte_bar("reading", total, as_json) as progress, ExitStack() as stack:
        bars: list[Callable[[str], None]] = []

        def on_model(name: str) -> None:
            if not bars:
                bars.append(stack.enter_context(tried_bar(as_json)))
            bars[0](name)

        return delta_page(
            delta, base, fine=fine, source=source, allow_changed_files=allow_changed_files,
            ignore_config_fields=ignore_config_fields, progress=progress, on_model=on_model,
            command=as_given(shlex.join(["darex", "report", str(out), *options])),
        )  # fmt: skip
