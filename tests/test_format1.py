"""Compatibility with artifacts of format 1 from before optional fields were added.

`data/format1` has four of them with their bases: a float32 DARE with a task head, a bfloat16 DAREx-q with one
q per parameter, one with extra vocabulary rows and its own companion files, and a float32 fine-tuned model of
a bfloat16 base, which the original version restored in bfloat16. `digests.json` has the digests of what that
version restored.
"""

import json
from contextlib import nullcontext
from pathlib import Path

import blake3
import numpy as np
import pytest

from darex_jax.core.errors import DarexWarning
from darex_jax.files.artifact import DeltaFile, load_delta, load_kept
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.recipe import tensor_line
from darex_jax.files.restore import apply_artifact, restored_params, verify_artifact
from darex_jax.files.safetensors import as_bytes

FOLDER = Path(__file__).parent / "data/format1"
DIGESTS = json.loads((FOLDER / "digests.json").read_text())


def digest(name, array):
    array = np.ascontiguousarray(array)
    return blake3.blake3(tensor_line(name, array.dtype, array.shape) + bytes(as_bytes(array))).hexdigest()


def warned(text):
    return pytest.warns(DarexWarning, match=text) if text else nullcontext()


@pytest.mark.parametrize("case", DIGESTS)
def test_restores_the_bits_of_its_time(tmp_path, case):
    expected = DIGESTS[case]["parameters"]
    # Old deltas lack digests of the base's files, if the restored model inherits any.
    takes_files = case in ("darex_bfloat16_q_by_name", "extra_rows_and_files")
    unknown = "does not record the base's" if takes_files else None
    with Checkpoint(FOLDER / case / "base") as base, DeltaFile(FOLDER / case / "delta.safetensors") as delta:
        with warned(unknown):
            assert verify_artifact(delta, base)["base"] == "ok"
        assert {name: digest(name, array) for name, array in restored_params(base, delta)} == expected
        with warned(unknown):
            apply_artifact(base, delta, tmp_path / "out")
    with Checkpoint(tmp_path / "out") as restored:
        assert {name: digest(name, tensor.read()) for name, tensor in restored.tensors.items()} == expected
    files = {name: (tmp_path / "out" / name).read_bytes() for name in DIGESTS[case]["files"]}
    if case == "float32_fine_of_bfloat16":  # written in the base's dtype, unlike the fine-tuned config.json
        assert json.loads(files.pop("config.json"))["torch_dtype"] == "bfloat16"
    for name, content in files.items():
        assert blake3.blake3(content).hexdigest() == DIGESTS[case]["files"][name]


def test_their_deltas_are_read():
    path = FOLDER / "dare_float32_head/delta.safetensors"
    assert set(load_delta(path)["bert"]) == {"embeddings", "encoder", "pooler"}
    assert set(load_kept(path)["classifier"]) == {"weight", "bias"}
