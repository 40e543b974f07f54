"""The `darex` command. Each command parses, calls one library function and prints a short summary.

Imports are inside the commands: `darex --help` does not import jax, and the commands on files import neither
transformers nor, except for merge-adapter, flax.
"""

import signal
import traceback
from typing import Any

import click

from darex_jax.cli import choose, experiment, files, hub, learn, merge, prune, recommend, report, text, train
from darex_jax.cli.show import plain, warnings_shown
from darex_jax.cli.signals import unwinding
from darex_jax.cli.stores import as_given, with_stores
from darex_jax.core.errors import DarexError

# Options that save memory, and what to say of them.
LESS_MEMORY = {
    "--batch-size": "a smaller --batch-size",
    "--accumulate": "--accumulate",
    "--remat": "--remat",
    "--dtype": "--dtype bfloat16",
    "--one-copy": "--one-copy",
    "--block-wise": "--block-wise (decoders)",
    "--method": "--method dare or magnitude, which stream",
    "--limit": "a smaller --limit",
}


class FriendlyGroup(click.Group):
    """User errors give one line on stderr and exit code 1; Ctrl-C gives 130, SIGTERM 143.

    A bug of this library gives one line as well, which says so; `--debug` shows its traceback.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with unwinding(), warnings_shown() as ctx.obj:  # the list is also in a command's context
                return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(128 + signal.SIGINT)
        except click.ClickException as error:
            vars(error)["message"] = plain(error.message)  # it may quote a file
            raise
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):  # click's own: it ends quietly
            raise
        except (DarexError, OSError, FloatingPointError) as error:
            _show_traceback(ctx)
            raise click.ClickException(_one_message(error)) from error
        except Exception as error:
            _show_traceback(ctx)
            lines = str(error).strip().splitlines() or [""]
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in lines[0]:
                raise click.ClickException(_out_of_memory(self, ctx, lines[0])) from error
            raise click.ClickException(
                f"this is a bug in darex_jax: {type(error).__name__}: {plain(lines[0]):.200} "
                "(darex --debug COMMAND ... shows where; please report it)"
            ) from error


def _out_of_memory(group: click.Group, ctx: click.Context, said: str) -> str:
    """What happened, and the running command's options that need less."""
    command = group.commands[ctx.invoked_subcommand or ""]
    own = {option for each in command.params for option in each.opts}
    less = [text for option, text in LESS_MEMORY.items() if option in own]
    advice = f" What needs less: {', '.join(less)}." if less else ""
    return f"out of memory ({plain(said):.200}).{advice}"


def _show_traceback(ctx: click.Context) -> None:
    if ctx.params.get("debug"):
        traceback.print_exc()


def _one_message(error: Exception) -> str:
    said = str(error)
    if isinstance(error, OSError) and error.strerror:
        said = f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return plain(as_given(said))


@click.group(cls=FriendlyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, expose_value=True, help="Show the traceback of an error.")
@click.version_option(package_name="darex_jax")
def main(debug: bool) -> None:
    """Store a fine-tuned model as its base plus a small, pruned delta."""


for command in (
    files.check,
    recommend.recommend,
    prune.prune,
    files.apply,
    files.inspect,
    files.verify,
    files.merge_adapter,
    files.export,
    hub.push,
    hub.pull,
    merge.merge,
    train.train,
    train.repeat,
    learn.evaluate,
    choose.find_q,
    learn.demo,
    text.generate,
    text.sample,
    report.report,
    experiment.experiment,
):
    assert command.callback is not None
    command.callback = with_stores(command.callback)
    main.add_command(command)
