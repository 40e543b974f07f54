"""Time and memory of one optimizer step on 100 M float32 parameters, compared with peers.

    python benchmarks/adamr.py [--json FILE]

Every round runs every method once, so that machine noise affects all alike; the median over rounds is
reported, with the fastest and the slowest. Parameters and state are donated. Clipping is by global norm: in
optax's chain, and as in the training loop, where the norm is also passed to AdamR. "published" is Algorithm 1
as in its authors' PyTorch code, tensor by tensor, which first copies the whole pretrained model in every
step. Memory is what XLA reports for the compiled step beyond its arguments and results.
"""

import argparse
import copy
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import darex_jax as dx

LAYER = {"q": (768, 768), "k": (768, 768), "v": (768, 768), "o": (768, 768), "up": (3072, 768),
         "down": (768, 3072), "bias": (3072,), "norm": (768,)}  # fmt: skip
SHAPES = {"embed": (20_000, 768), **{f"{i}.{n}": s for i in range(12) for n, s in LAYER.items()}}
RATE, DECAY, CLIP = 1e-4, 1e-3, 1.0


def tree(seed: int, scale: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: scale * rng.standard_normal(s, dtype=np.float32) for n, s in SHAPES.items()}


def clipped(grads: dict) -> tuple[dict, jax.Array]:
    norm = optax.tree.norm(grads)
    scale = jnp.minimum(1.0, CLIP / norm)
    return jax.tree.map(lambda g: g * scale, grads), norm * scale


def adamw(params, state, grads, _):
    return optax.adamw(RATE, weight_decay=DECAY).update(grads, state, params)


def adamw_chain(params, state, grads, _):
    grads, _ = optax.clip_by_global_norm(CLIP).update(grads, optax.EmptyState())
    return optax.adamw(RATE, weight_decay=DECAY).update(grads, state, params)


def adamw_clip(params, state, grads, _):
    grads, _ = clipped(grads)
    return optax.adamw(RATE, weight_decay=DECAY).update(grads, state, params)


def adamr(params, state, grads, pretrained):
    return dx.adamr(RATE, weight_decay=DECAY).update(grads, state, params, pretrained=pretrained)


def adamr_l1(params, state, grads, pretrained):
    return dx.adamr(RATE, weight_decay=DECAY, norm="l1").update(grads, state, params, pretrained=pretrained)


def adamr_amsgrad(params, state, grads, pretrained):
    transform = dx.adamr(RATE, weight_decay=DECAY, amsgrad=True)
    return transform.update(grads, state, params, pretrained=pretrained)


def adamr_clip(params, state, grads, pretrained):
    grads, norm = clipped(grads)
    transform = dx.adamr(RATE, weight_decay=DECAY)
    return transform.update(grads, state, params, pretrained=pretrained, gradient_norm=norm)


METHODS = {
    "adamw": (adamw, optax.adamw(RATE)),
    "adamr": (adamr, dx.adamr(RATE)),
    "adamr, l1": (adamr_l1, dx.adamr(RATE)),
    "adamr, amsgrad": (adamr_amsgrad, dx.adamr(RATE, amsgrad=True)),
    "adamw, optax's clip in a chain": (adamw_chain, optax.adamw(RATE)),
    "adamw, clip": (adamw_clip, optax.adamw(RATE)),
    "adamr, clip": (adamr_clip, dx.adamr(RATE)),
}


def compiled(name: str, params: dict, grads: dict, pretrained: dict) -> tuple[Callable[[], None], int]:
    """A function that runs one step, and the compiled step's temporary bytes."""
    update, transform = METHODS[name]

    def step(params, state, grads, pretrained):
        updates, state = update(params, state, grads, pretrained)
        return optax.apply_updates(params, updates), state

    held = [jax.tree.map(jnp.copy, params), transform.init(params)]
    program = jax.jit(step, donate_argnums=(0, 1)).lower(*held, grads, pretrained).compile()

    def run() -> None:
        held[:] = program(*held, grads, pretrained)
        jax.block_until_ready(held)

    return run, program.memory_analysis().temp_size_in_bytes


class Published:
    """Algorithm 1 in PyTorch, with the same passes as its authors' code."""

    def __init__(self, params: dict, grads: dict, pretrained: dict):
        self.params, self.grads, self.pretrained = (
            [torch.from_numpy(np.array(x)) for x in t.values()] for t in (params, grads, pretrained)
        )
        self.m = [torch.zeros_like(p) for p in self.params]
        self.v = [torch.zeros_like(p) for p in self.params]
        self.t = 0

    @torch.no_grad()
    def __call__(self) -> None:
        self.t += 1
        first, second = 1 - 0.9**self.t, 1 - 0.999**self.t
        total = 0.0
        for g, m, v in zip(self.grads, self.m, self.v, strict=True):
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.999).addcmul_(g, g, value=0.001)
            total += (v / second).sum()
        s = math.sqrt(total / sum(p.numel() for p in self.params)) or 1.0
        for p, p0, m, v in zip(self.params, copy.deepcopy(self.pretrained), self.m, self.v, strict=True):
            p.add_(p - p0, alpha=-RATE * DECAY / s)
            p.addcdiv_(m, (v / second).sqrt().add_(1e-8), value=-RATE / first)


def torch_adamw(params: dict, grads: dict) -> Callable[[], object]:
    leaves = [torch.nn.Parameter(torch.from_numpy(np.array(x))) for x in params.values()]
    for leaf, grad in zip(leaves, grads.values(), strict=True):
        leaf.grad = torch.from_numpy(np.array(grad))
    return torch.optim.AdamW(leaves, lr=RATE, weight_decay=DECAY).step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    params, grads, pretrained = (
        jax.tree.map(jnp.asarray, tree(i, s)) for i, s in enumerate((1.0, 1e-3, 1.0))
    )
    runs, temporary = {}, {}
    for name in METHODS:
        runs[name], temporary[name] = compiled(name, params, grads, pretrained)
    runs["PyTorch: adamw"] = torch_adamw(params, grads)
    runs["PyTorch: adamr, published"] = Published(params, grads, pretrained)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(options.rounds + 1):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            if turn:  # the first is a warm-up
                times[name].append(time.perf_counter() - begun)
    size = sum(x.size for x in params.values())
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    versions = {p: version(p) for p in ("jax", "optax", "torch")}
    print(f"{size:,} parameters, {options.rounds} rounds; {machine}; {versions}")
    results = {}
    for name, seconds in times.items():
        base = "adamw, clip" if "clip" in name else "adamw"
        # Ratios per round: machine noise affects both alike.
        ratios = [s / b for s, b in zip(seconds, times[base], strict=True)]
        results[name] = {
            "ms": [round(1e3 * f(seconds), 1) for f in (statistics.median, min, max)],
            "ratio": [round(f(ratios), 3) for f in (statistics.median, min, max)],
            "ratio_of_fastest": round(min(seconds) / min(times[base]), 3),
            "to": base,
            "temporary_bytes": temporary.get(name),
        }
        middle, low, high = results[name]["ms"]
        spare = "" if name not in temporary else f"  {temporary[name] / 1e6:7.1f} MB temporary"
        print(
            f"{name:32} {middle:7.1f} ms ({low:.1f}-{high:.1f})  {results[name]['ratio'][0]:.2f} times {base}"
            f" (fastest: {results[name]['ratio_of_fastest']:.2f}){spare}"
        )
    if options.json:
        content = {"parameters": size, "machine": machine, "versions": versions, "results": results}
        with open(options.json, "w") as file:
            json.dump(content, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
