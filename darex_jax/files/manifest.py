"""What a run was: enough to repeat it and to see whether the repeat agrees."""

import platform
from collections.abc import Mapping
from typing import Any

import blake3

from darex_jax.files.artifact import tensor_line, versions
from darex_jax.files.safetensors import as_bytes, on_host


def params_digest(params: Any) -> str:
    """BLAKE3 over the name, dtype, shape and bits of every leaf, by name: a digest of a model.

    Parameters on devices pass through the host one at a time.
    """
    from darex_jax.core.tree import flatten_names

    digest = blake3.blake3()
    for name, leaf in sorted(flatten_names(params).items()):
        digest.update(tensor_line(name, leaf.dtype, leaf.shape))
        digest.update(as_bytes(on_host(leaf)))
    return digest.hexdigest()


def run_manifest(
    command: str, options: Mapping[str, Any], inputs: Mapping[str, str], outputs: Mapping[str, str]
) -> dict[str, Any]:
    """The manifest of a run, ready for JSON.

    Args:
      command: the command's name, `train` say.
      options: its options as resolved, with the seed that every key follows from.
      inputs, outputs: digests by what they are of.
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
