"""The `darex` command, also as `python -m darex_jax`."""

import sys


def main() -> None:
    """Runs the command line, if what it needs beside the library is installed."""
    try:
        from darex_jax.cli import main as command
    except ModuleNotFoundError as error:
        sys.exit(f"darex: {error.name} is not installed; it comes with pip install 'darex_jax[all]'")
    command(prog_name="darex")


if __name__ == "__main__":
    main()
