"""Small checkpoints of a base and a fine-tune, and what tests do with them."""

import json

import ml_dtypes
import numpy as np
from click.testing import CliRunner

from darex_jax.cli import main
from darex_jax.core.scope import choose_scope
from darex_jax.files.checkpoint import INDEX, Checkpoint
from darex_jax.files.prune import Job, prune_checkpoints
from darex_jax.files.safetensors import write_tensors

BF16 = np.dtype(ml_dtypes.bfloat16)


def encoder(seed, dtype=np.float32, step=1e-3, prefix="bert.", head=True, rows=50):
    """A toy encoder's state dict; `seed` 0 is the base, others are fine-tunes of it."""
    shapes = {
        "embeddings.word_embeddings.weight": (rows, 16),
        "encoder.layer.0.output.dense.weight": (16, 64),
        "encoder.layer.0.output.dense.bias": (16,),
        "encoder.layer.0.output.LayerNorm.weight": (16,),
        "pooler.dense.weight": (16, 16),
    }
    base, fine = np.random.default_rng(0), np.random.default_rng(seed + 1)
    named = {}
    for name, shape in shapes.items():
        leaf = base.normal(size=(60, *shape[1:]) if "word" in name else shape)[: shape[0]]
        named[prefix + name] = (leaf + (seed > 0) * step * fine.normal(size=shape)).astype(dtype)
    named[prefix + "embeddings.position_ids"] = np.arange(8, dtype=np.int64)[None]
    if head:
        named["classifier.weight"] = fine.normal(size=(2, 16)).astype(dtype)
    return named


def write(path, named, config=None, shards=1):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "bert"} | (config or {})))
    if shards == 1:
        write_tensors(path / "model.safetensors", named)
        return path
    weight_map = {}
    for i in range(shards):
        part = {name: named[name] for name in sorted(named)[i::shards]}
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        write_tensors(path / file, part)
        weight_map |= dict.fromkeys(part, file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def darex(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def prune(base, fine, out, drop_rate=0.9, q=None, **more):
    with Checkpoint(base) as b, Checkpoint(fine) as f:
        job = Job(b, f, out, choose_scope("bert"), **more)
        return prune_checkpoints(job, key=(0, 0), drop_rate=drop_rate, q=q)


def read_all(path):
    with Checkpoint(path) as checkpoint:
        return {name: tensor.read() for name, tensor in checkpoint.tensors.items()}


FILES = {"config.json": '{"model_type": "bert", "layer_norm_eps": 1e-12}', "vocab.txt": "[UNK]\na\n"}


def with_files(path, files=FILES):
    for name, text in files.items():
        (path / name).write_text(text)
    return path
