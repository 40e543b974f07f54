"""The `darex` command. Each command parses, calls one library function and prints a short summary.

Imports stay inside the commands: `darex --help` must not wait for jax, and the commands on files need
neither transformers nor, merge-adapter apart, flax.
"""

from typing import Any

import click

from darex_jax.cli import choose, files, learn, text, train


class FriendlyGroup(click.Group):
    """A user's mistake ends in one line on stderr and exit code 1; Ctrl-C in 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, FloatingPointError) as error:
            raise click.ClickException(_one_message(error)) from error


def _one_message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return str(error)


@click.group(cls=FriendlyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="darex_jax")
def main() -> None:
    """Prune the delta of a fine-tuned model: drop 90-99.9 % of it, rescale what is left, keep the ability."""


for command in (
    files.check,
    files.prune,
    files.apply,
    files.inspect,
    files.verify,
    files.merge_adapter,
    train.train,
    train.repeat,
    learn.evaluate,
    choose.find_q,
    learn.demo,
    text.generate,
):
    main.add_command(command)
