"""Fuzzing: passes damaged and forged artifacts to all of their readers.

    python -m tests.fuzz_artifact FOLDER --cases 20000 --seed 0

A case is a modified artifact: bytes flipped, truncated or appended, its header, recipe or tensors changed,
with or without updated digests. Every reader must accept it or refuse it with a `DarexError` with our
message; nothing may hang, use excessive memory, or raise another exception. The process is limited in memory,
each case in time. `test_fuzz.py` runs a thousand cases.
"""

import argparse
import copy
import json
import random
import re
import resource
import shutil
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import blake3
import ml_dtypes
import numpy as np
import zstandard

from darex_jax.core.errors import DarexError, DarexWarning
from darex_jax.core.scope import choose_scope
from darex_jax.files.artifact import DeltaFile, load_delta, load_kept
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.export import export_adapter
from darex_jax.files.prune import Job, prune_checkpoints
from darex_jax.files.recipe import canonical_json, tensor_line
from darex_jax.files.restore import apply_artifact, restored_params, verify_artifact
from darex_jax.files.safetensors import DTYPES, as_bytes, write_tensors
from darex_jax.methods.budget import Budget
from darex_jax.runs.prune import prune_by

MEMORY = 700 << 20  # bytes above the initial memory of the process
SECONDS = 20  # per case
# Messages of Python, NumPy and JAX.
FOREIGN = re.compile(
    r"Expecting|object is not|not subscriptable|NoneType|invalid literal|unpack|out of range|list ind|<class|"
    r"positional argument|has no attribute|cannot reshape|broadcast|Exceeds the limit|codec can|unhashable|"
    r"Errno"
)
WORDS = "rows/bert.embeddings.word_embeddings.weight"  # with extra rows the delta cannot be loaded
THINGS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 255, 2**31, 2**32, 2**46, 2**63, 2**64, 10**400, 0.5, 1 - 2**-33, 1 - 2**-32, 1.0),
    *(1e-50, 1e39, float("nan"), float("inf"), True, None, "", "x", "\x1b[31m\n\u202e", "../../x", "F32"),
    *("BF16", "I64", "config.json", "0" * 64, "a" * 600, [], [0], [2**46], [2**40, 2**40], [0, 2**47]),
    *([1] * 33, [[[[1]]]], {}, {"": 0}, {"shape": [1]}),
)


def make_models(folder: Path) -> list[Path]:
    """Artifacts of one base: with a head, rows and files; bfloat16; nothing dropped; every kind of part."""
    rng = np.random.default_rng(0)
    shapes = {"embeddings.word_embeddings.weight": (30, 8), "encoder.layer.0.output.dense.weight": (8, 16),
              "encoder.layer.0.output.dense.bias": (8,), "pooler.dense.weight": (8, 8)}  # fmt: skip
    base = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    def write(name: str, named: dict[str, np.ndarray], config: str) -> Path:
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(config)
        (folder / name / "vocab.txt").write_text("a\n")
        write_tensors(folder / name / "model.safetensors", named)
        return folder / name

    write("base", {**base, "cls.bias": np.zeros(3, np.float32)}, '{"model_type": "bert", "dtype": "float32"}')
    moved = {f"bert.{name}": leaf + np.float32(0.01) for name, leaf in base.items()}
    words = "bert.embeddings.word_embeddings.weight"
    rows = {
        **moved,
        words: np.concatenate([moved[words], moved[words][:2]]),
        "classifier.bias": np.ones(2, np.float32),
    }
    half = {name: leaf.astype(ml_dtypes.bfloat16) for name, leaf in moved.items()}
    fines = [
        (write("rows", rows, '{"model_type": "bert", "num_labels": 2}'), 0.5, None),
        (write("half", half, '{"model_type": "bert", "dtype": "float32"}'), 0.9, 0.3),
        (write("all", moved, '{"model_type": "bert", "dtype": "float32"}'), 0.0, None),
    ]
    artifacts = []
    for fine, drop_rate, q in fines:
        artifacts.append(folder / f"{fine.name}.delta")
        with Checkpoint(folder / "base") as b, Checkpoint(fine) as f:
            job = Job(b, f, artifacts[-1], choose_scope("bert"))
            prune_checkpoints(job, key=(0, 7), drop_rate=drop_rate, q=q)
    methods = {"dare": {"bits": 8}, "magnitude": {"bits": 4}, "structured": {}, "sign-svd": {"bits": 2}}
    for method, options in methods.items():
        artifacts.append(folder / f"{method}.delta")
        with Checkpoint(folder / "base") as b, Checkpoint(folder / "rows") as f:
            job = Job(b, f, artifacts[-1], choose_scope("bert"))
            prune_by(job, method, Budget(drop_rate=0.5), options=options)
    return artifacts


class Artifact:
    """An artifact's bytes, and its components for mutations."""

    def __init__(self, path: Path):
        self.bytes = path.read_bytes()
        length = int.from_bytes(self.bytes[:8], "little")
        self.header = json.loads(self.bytes[8 : 8 + length])
        self.body = self.bytes[8 + length :]
        with DeltaFile(path) as file:
            self.tensors = {name: file.read(name) for name in file.tensors}
            self.recipe = json.loads(file.recipe.to_json())
        self.tensors.pop("recipe", None)


def mutate(rng: random.Random, source: Artifact) -> bytes:
    often = (change_recipe, change_tensors)
    first = (thin_out,) if source.recipe["format"] == 1 else (change_block,)
    kinds = (flip, cut, change_header, *first, *often, *often)
    return rng.choice(kinds)(rng, source)


def flip(rng: random.Random, source: Artifact) -> bytes:
    data = bytearray(source.bytes)
    for _ in range(rng.choice((1, 1, 1, 4, 32))):
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    return bytes(data)


def cut(rng: random.Random, source: Artifact) -> bytes:
    if rng.random() < 0.2:
        return source.bytes + rng.randbytes(rng.randrange(1, 100))
    start = rng.randrange(len(source.bytes))
    return source.bytes[:start] + (
        source.bytes[start + rng.randrange(1, 64) :] if rng.random() < 0.3 else b""
    )


def change_header(rng: random.Random, source: Artifact) -> bytes:
    header = change_json(rng, json.loads(json.dumps(source.header)))
    text = canonical_json(header).encode()
    return len(text).to_bytes(8, "little") + text + source.body


def change_recipe(rng: random.Random, source: Artifact) -> bytes:
    recipe = json.loads(json.dumps(source.recipe))
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        recipe = change_json(rng, recipe)
    return assemble(recipe, source.tensors, honest=rng.random() < 0.9)


def thin_out(rng: random.Random, source: Artifact) -> bytes:
    """Very few values, as with a drop rate near 1, for which a recipe can claim almost any shape."""
    recipe, few = json.loads(json.dumps(source.recipe)), rng.choice((0, 0, 1, 30))
    tensors = {n: a[:few] if n.startswith("values/") else a for n, a in source.tensors.items()}
    recipe["drop_rate"] = rng.choice((1 - 2**-33, 1 - 2**-32, 1 - 2**-20))
    for name in rng.sample(list(recipe["parameters"]), rng.randrange(1, 3)):
        shape = [rng.choice((0, 1, 2**20, 2**24, 2**31, 2**44)), *recipe["parameters"][name]["shape"][1:]]
        for entry in (recipe["parameters"][name], recipe["base"][recipe["base_names"].get(name, name)]):
            entry["shape"] = shape
    return assemble(recipe, tensors, honest=True)


def change_block(rng: random.Random, source: Artifact) -> bytes:
    """Changes coded bytes or their metadata, with updated digests."""
    recipe, tensors = json.loads(json.dumps(source.recipe)), dict(source.tensors)
    if rng.random() < 0.5:
        recipe["blocks"] = change_json(rng, recipe["blocks"])
    else:
        parts = tensors["parts"].copy()
        for _ in range(rng.choice((1, 1, 4, 32))):
            parts[rng.randrange(len(parts))] = rng.randrange(256)
        tensors["parts"] = parts
    return assemble(recipe, tensors, honest=True)


def change_tensors(rng: random.Random, source: Artifact) -> bytes:
    tensors, recipe = dict(source.tensors), json.loads(json.dumps(source.recipe))
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(list(tensors))
        array = tensors[name]
        what = rng.randrange(7)
        if what == 0:
            del tensors[name]
        elif what == 1:
            tensors[
                name.replace(name.split("/")[0], rng.choice(("values", "dense", "rows", "file", "x")), 1)
            ] = array
        elif what == 2:
            tensors[name] = array.reshape(rng.choice(((-1,), (1, -1), (-1, 1), (1, 1, -1))))
        elif what == 3:
            tensors[name] = np.resize(array, rng.choice((0, 1, 5, array.size + 1, max(0, array.size - 1))))
        elif what == 4:
            with np.errstate(all="ignore"):
                tensors[name] = array.astype(rng.choice(list(DTYPES.values())))
        elif what == 5:
            data = np.frombuffer(rng.randbytes(array.nbytes), array.dtype)
            tensors[name] = data.reshape(array.shape)
        else:
            tensors[
                rng.choice(("dense/a", "dense/bert", "file/vocab.txt", "rows/a", "values/a.b", "dense/a.b"))
            ] = array
        if not tensors:
            break
    return assemble(recipe, tensors, honest=rng.random() < 0.9)


def change_json(rng: random.Random, value: Any) -> Any:
    """The same JSON with one value replaced, removed, duplicated or renamed."""
    places = []

    def walk(node):
        keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            places.append((node, key))
            walk(node[key])

    walk(value)
    if not places or rng.random() < 0.01:
        return thing(rng)
    node, key = rng.choice(places)
    what = rng.random()
    if what < 0.15:
        del node[key]
    elif what < 0.3 and isinstance(node, dict):
        node[rng.choice([k for k in THINGS if isinstance(k, str)])] = node.pop(key)
    elif what < 0.4:
        other, other_key = rng.choice(places)
        node[key] = json.loads(json.dumps(other[other_key]))
    elif isinstance(node[key], list) and what < 0.7:
        node[key] = [*node[key], thing(rng)][rng.randrange(2) :]
    else:
        node[key] = thing(rng)
    return value


def thing(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(THINGS))  # inserted values may be changed again


def assemble(recipe: Any, tensors: dict[str, np.ndarray], honest: bool) -> bytes:
    """Assembles a file; `honest`: with correct digests."""
    ordered = {n: tensors[n] for n in sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n))}
    second = isinstance(recipe, dict) and recipe.get("format") == 2
    if honest and second and "parts" in tensors:
        _digest_blocks(recipe, np.ascontiguousarray(tensors["parts"]).tobytes())
    if honest and isinstance(recipe, dict) and "data_blake3" in recipe:
        digest = blake3.blake3()
        for name, array in ordered.items():
            array = np.ascontiguousarray(array)
            digest.update(tensor_line(name, array.dtype, array.shape))
            digest.update(as_bytes(array))
        recipe["data_blake3"] = digest.hexdigest()
    text = canonical_json(recipe)
    stated = canonical_json({"format": 2}) if second else text
    header = {"__metadata__": {"darex": stated, "blake3": blake3.blake3(text.encode()).hexdigest()}}
    if second:
        coded = zstandard.ZstdCompressor().compress(text.encode())
        ordered["recipe"] = np.frombuffer(coded, np.uint8)
    body = b""
    for name, array in ordered.items():
        data = np.ascontiguousarray(array).tobytes()
        dtype = next(n for n, d in DTYPES.items() if d == array.dtype)
        header[name] = {
            "dtype": dtype, "shape": list(array.shape), "data_offsets": [len(body), len(body) + len(data)]
        }  # fmt: skip
        body += data
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + body


def _digest_blocks(recipe: dict[str, Any], parts: bytes) -> None:
    start = 0
    for block in recipe["blocks"] if isinstance(recipe.get("blocks"), list) else ():
        size = block.get("bytes") if isinstance(block, dict) else None
        if type(size) is not int or not 0 <= size <= len(parts):
            return
        block["blake3"] = blake3.blake3(parts[start : start + size]).hexdigest()
        start += size


def read_in_every_way(path: Path, base: Path, out: Path) -> int:
    """The number of readers that accept it. Raises: unexpected exceptions."""
    taken = 0
    files = (_inspect, _verify, load_delta, _parts, load_kept, _export_alone)
    for reader in (*files, _verify_base, _restore, _apply, _export):
        try:
            reader(path, base, out) if reader.__name__.startswith("_") else reader(path)
            taken += 1
        except DarexError as error:
            if FOREIGN.search(str(error).replace(str(path.parent), "")) or not str(error):
                raise RuntimeError(f"{reader.__name__}: not in our words: {error!r}") from error
            if out.exists():
                raise RuntimeError(f"{reader.__name__}: left something behind: {error!r}") from error
        shutil.rmtree(out, ignore_errors=True)
    return taken


def _inspect(path, base, out):
    with DeltaFile(path) as delta:
        delta.recipe.digest()
        delta.config()


def _parts(path, base, out):
    load_delta(path, parts=True)


def _verify(path, base, out):
    with DeltaFile(path) as delta:
        verify_artifact(delta)


def _verify_base(path, base, out):
    with Checkpoint(base) as b, DeltaFile(path) as delta:
        verify_artifact(delta, b)


def _restore(path, base, out):
    with Checkpoint(base) as b, DeltaFile(path) as delta:
        for _ in restored_params(b, delta):
            pass


def _apply(path, base, out):
    with Checkpoint(base) as b, DeltaFile(path) as delta:
        apply_artifact(b, delta, out)


def _export(path, base, out):
    with Checkpoint(base) as b, DeltaFile(path) as delta:
        export_adapter(delta, out, base=b, rank=2)


def _export_alone(path, base, out):
    with DeltaFile(path) as delta:
        export_adapter(delta, out, rank=2)


def _too_long(*_):
    raise TimeoutError(f"a case took more than {SECONDS} seconds")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = arguments.folder
    sources = [Artifact(path) for path in make_models(folder)]
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", DarexWarning)
    path = folder / "case"
    for source in sources:  # unchanged, which also compiles everything
        path.write_bytes(source.bytes)
        if read_in_every_way(path, folder / "base", folder / "out") < (
            6 if source.tensors.keys() & {WORDS} else 9
        ):
            print("a sound artifact is refused")
            return 1
    status = Path("/proc/self/status").read_text()
    data = int(re.search(r"VmData:\s*(\d+) kB", status).group(1)) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (data + MEMORY, data + MEMORY))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, _too_long)
    failures = taken = 0
    for case in range(arguments.cases):
        rng = random.Random(f"{arguments.seed} {case}")
        path.write_bytes(mutate(rng, rng.choice(sources)))
        signal.alarm(SECONDS)
        try:
            taken += bool(read_in_every_way(path, folder / "base", folder / "out"))
        except Exception:
            failures += 1
            print(f"case {case}:\n{traceback.format_exc()}", flush=True)
            shutil.copy(path, folder / f"case-{case}")
        finally:
            signal.alarm(0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) << 10
    print(f"{arguments.cases} cases, {taken} taken by a reader, {failures} failures, {grown >> 20} MiB more")
    return int(failures > 0 or grown > MEMORY)


if __name__ == "__main__":
    sys.exit(main())
