"""What benchmarks of a fine-tuned MiniLM share: their options, their timing and their report."""

import argparse
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

from darex_jax.runs.demo import demo_weights


def timed(function, *args):
    begun = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - begun, result


def spread(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds)}


def options_of(text: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--fine", type=Path, required=True)
    parser.add_argument("--base", type=Path, default=None)
    parser.add_argument("--task", default="opinions")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--json", type=Path)
    return parser


def begun(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, with a base; PyTorch takes all cores."""
    options = parser.parse_args()
    options.base = options.base or demo_weights()
    torch.set_num_threads(os.cpu_count() or 1)
    transformers.utils.logging.disable_progress_bar()
    return options


def report(results: dict, path: Path | None) -> None:
    """Prints the results with the machine and the versions, and writes them to a file."""
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {p: version(p) for p in ("jax", "torch", "transformers", "numpy")},
    }
    text = json.dumps(about | results, indent=2)
    print(text)
    if path:
        path.write_text(text + "\n")
