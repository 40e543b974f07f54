"""Run manifests: options, digests and versions to reproduce a run and compare the result."""

import os
import platform
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import blake3

from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.recipe import tensor_line, versions
from darex_jax.files.safetensors import as_bytes, on_host
from darex_jax.files.stream import Progress, tensor_digest


def params_digest(params: Any) -> str:
    """Digest of a model: BLAKE3 over the name, dtype, shape and bits of every leaf, by name.

    Parameters are copied to the host one at a time.
    """
    from darex_jax.core.tree import flatten_names

    digest = blake3.blake3()
    for name, leaf in sorted(flatten_names(params).items()):
        digest.update(tensor_line(name, leaf.dtype, leaf.shape))
        digest.update(as_bytes(on_host(leaf)))
    return digest.hexdigest()


def weights_digest(checkpoint: Checkpoint, progress: Progress = lambda _: None) -> str:
    """BLAKE3 over the name, dtype, shape and digest of every stored tensor, by name.

    The files are read once, on all cores, without loading arrays. Sharding over files does not matter.
    """
    digest = blake3.blake3()
    tensors = sorted(checkpoint.tensors.items())
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = pool.map(partial(tensor_digest, progress=progress), [tensor for _, tensor in tensors])
        for (name, tensor), own in zip(tensors, found, strict=True):
            digest.update(tensor_line(name, tensor.info.dtype, tensor.info.shape) + own.encode())
    return digest.hexdigest()


def run_manifest(
    command: str, options: Mapping[str, Any], inputs: Mapping[str, str], outputs: Mapping[str, str]
) -> dict[str, Any]:
    """The manifest of a run, ready for JSON.

    Args:
      command: the command's name, such as `train`.
      options: its resolved options, including the seed of all keys.
      inputs, outputs: digests by the name of what they belong to.
    """
    import jax

    device = jax.devices()[0]
    return {
        "command": command,
        "options": {name: str(v) if hasattr(v, "__fspath__") else v for name, v in options.items()},
        "inputs": dict(inputs),
        "outputs": dict(outputs),
        "versions": versions("flax", "optax", "transformers", "datasets"),
        "platform": {
            "system": platform.system(),
            "machine": platform.machine(),
            "backend": device.platform,
            "device": device.device_kind,
            "devices": jax.device_count(),
        },
    }
