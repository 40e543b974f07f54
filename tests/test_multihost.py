"""Two processes, as on two hosts, give the same model as one."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import darex_jax as dx
from darex_jax.core.tree import unflatten_names

SHAPES = {
    "model.embed_tokens.weight": (64, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.self_attn.o_proj.weight": (16, 16),
    "model.layers.0.input_layernorm.weight": (16,),
}


def model(seed):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    leaves = zip(SHAPES.items(), keys, strict=True)
    return unflatten_names({name: jax.random.normal(k, shape, jnp.bfloat16) for (name, shape), k in leaves})


def run_together(folder, processes=2, timeout=100):
    """The outputs after all succeeded; if one fails, the others are terminated."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "tests.multihost", address, str(processes)]
    logs = [folder / f"log{i}" for i in range(processes)]
    children = []
    try:
        for i, log in enumerate(logs):
            with log.open("w") as out:
                child = subprocess.Popen(
                    [*command, str(i), str(folder)],
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    cwd=Path(__file__).parents[1],
                    env=environment,
                )
            children.append(child)
        end = time.monotonic() + timeout
        while any(child.poll() is None for child in children) and not any(child.poll() for child in children):
            if time.monotonic() > end:
                break
            time.sleep(0.05)
        outputs = [log.read_text() for log in logs]
        assert [child.poll() for child in children] == [0] * processes, "\n".join(outputs)
        return outputs
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_two_processes_make_the_model_that_one_makes(tmp_path):
    base, fine = model(0), model(1)
    pruned = dx.apply_delta(base, dx.prune(jax.random.key(0), dx.compute_delta(fine, base), 0.9, 0.2))
    for name, params in (("base", base), ("fine", fine), ("pruned", pruned)):
        dx.save_params(tmp_path / name, params)
    mask = dx.random_mask(jax.random.key(0), base, 0.9)
    survivors = sum(int(leaf.sum()) for leaf in jax.tree.leaves(mask))
    for output in run_together(tmp_path):
        assert f"split parameters with the same bits: 6; survivors: {survivors}\n" in output
