"""Commands for the Hugging Face hub: push, pull."""

import json
from pathlib import Path

import click

from darex_jax.cli.options import (
    JSON,
)
from darex_jax.cli.show import bytes_text, print_table
from darex_jax.cli.stores import OUT, PATH, as_given
from darex_jax.core.errors import DarexError

REVISION = click.option("--revision", help="A branch, tag or commit. Default: main.")


@click.command()
@click.argument("delta", type=PATH)
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--base-model", help="Name of the base on the hub, for the card.")
@click.option("--measured", type=PATH, multiple=True, help="Output of darex eval --json, for the card.")
@click.option("--private", is_flag=True, help="Create the repository as private.")
@REVISION
@click.option("--dry-run", is_flag=True, help="Print the card without uploading.")
@JSON
def push(
    delta: Path,
    repo: str,
    base_model: str | None,
    measured: tuple[Path, ...],
    private: bool,
    revision: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Upload DELTA and a model card to the Hugging Face hub.

    The repository has delta.safetensors and README.md; `darex pull` downloads it. Needs a token with write
    access (`hf auth login` or HF_TOKEN).
    """
    from darex_jax.files.artifact import DeltaFile
    from darex_jax.files.card import model_card
    from darex_jax.files.checkpoint import read_json
    from darex_jax.files.contents import contents
    from darex_jax.files.hub import push_delta

    with DeltaFile(delta) as file:
        facts = contents(file)
    card = model_card(facts, "darex_jax", base_model=base_model, measured=[read_json(m) for m in measured])
    if dry_run:
        click.echo(json.dumps({"repo": repo, "card": card}) if as_json else card, nl=as_json)
        return
    address = push_delta(delta, repo, card, private=private, revision=revision)
    if as_json:
        click.echo(json.dumps({"repo": repo, "url": address, "bytes": facts["bytes"]}))
    else:
        print_table(repo, [("pushed", bytes_text(facts["bytes"])), ("address", address)])


@click.command()
@click.argument("repo", metavar="OWNER/NAME")
@click.argument("out", type=OUT)
@REVISION
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@JSON
def pull(repo: str, out: Path, revision: str | None, overwrite: bool, as_json: bool) -> None:
    """Download a delta from the hub to OUT, and verify it."""
    from darex_jax.files.hub import pull_delta

    if out.exists() and not overwrite:
        raise DarexError(f"{out} already exists; pass --overwrite to replace it.")
    pull_delta(repo, out, revision=revision)
    size = out.stat().st_size
    if as_json:
        click.echo(json.dumps({"repo": repo, "out": as_given(str(out)), "bytes": size}))
    else:
        print_table(str(out), [("pulled", f"{repo}, {bytes_text(size)}"), ("digests", "verified")])
