"""Compiles for a TPU without one: a Llama-2-7B in bfloat16 over the 8 chips of a v5e 2x4 slice.

    python benchmarks/tpu_compile.py --folder /some/scratch --out benchmarks/results/tpu-compile.json

libtpu, in the version required by this JAX, is installed into the folder; its compiler needs no TPU. No
weights are allocated. Reported per device and program: the memory planned by the compiler, the collectives,
and for the prune step the HBM traffic against the floor, which reads both models and writes one.

XLA's own "bytes accessed" counts a prefetch from HBM into the chip's 128 MiB of VMEM as a read and a write
and also counts the read from VMEM, so it is far above the HBM traffic. Two numbers measure the traffic
itself: `hbm_bytes` counts it in the compiled program, and "no prefetch" is XLA's count of the same program
compiled without prefetching.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import darex_jax as dx
from darex_jax.core.sharding import batch_sharding
from darex_jax.core.tree import unflatten_names
from darex_jax.models import build_model, read_model_config
from darex_jax.models.generate import decode, prefill, stop_tokens

TOPOLOGY = "v5e:2x4"
LLAMA_2_7B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "hidden_act": "silu", "max_position_embeddings": 4096,
    "initializer_range": 0.02, "rms_norm_eps": 1e-5,
}  # fmt: skip
ROWS, PROMPT, NEW = 8, 512, 1024
NO_PREFETCH = {"xla_vf_vmem_max_outstanding_prefetches": "0"}
# Without a TPU there is no metadata server, so the target is set explicitly.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}  # fmt: skip

ITEM_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
}
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")  # dtype, dimensions, layout
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*?) ([a-z][a-z-]*)\(([^)]*)\)(.*)$", re.MULTILINE)
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "slice-done")
EXCHANGE = re.compile(r" (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")


def hbm_bytes(module: str) -> int:
    """Bytes that the entry of a compiled TPU module without loops reads from and writes to HBM.

    An array is in HBM unless its layout has another memory space, such as `S(1)`, VMEM. Each instruction
    reads its operands and writes its result; values inside a fusion never leave the chip.
    """
    entry = module[module.index("\nENTRY") :]
    assert " while(" not in entry
    types: dict[str, str] = {}
    total = 0
    for name, kind, operation, operands, rest in INSTRUCTION.findall(entry):
        types[name] = kind
        if operation in FREE or "ConcatBitcast" in rest:
            continue
        if operation in ("copy-start", "slice-start"):
            # The result is source, target and a flag; a copy has its target first, a slice its source.
            ends = [match.groups() for match in ARRAY.finditer(kind)][:2]
            source, target = ends if operation == "slice-start" else ends[::-1]
            total += sum(_array_bytes(*target[:2]) for end in (source, target) if _in_hbm(end[2]))
        else:
            read = (types.get(operand, "") for operand in re.findall(r"%([\w.-]+)", operands))
            arrays = [match.groups() for text in (kind, *read) for match in ARRAY.finditer(text)]
            total += sum(_array_bytes(*array[:2]) for array in arrays if _in_hbm(array[2]))
    return total


def _array_bytes(dtype: str, dimensions: str) -> int:
    return ITEM_BYTES[dtype] * math.prod(int(length) for length in dimensions.split(",") if length)


def _in_hbm(layout: str | None) -> bool:
    return "S(" not in (layout or "")


def compile_and_report(
    name: str, function: Any, *args: Any, options: Any = None
) -> tuple[Any, dict[str, Any]]:
    begun = time.perf_counter()
    compiled = function.lower(*args).compile(compiler_options=options)
    memory = compiled.memory_analysis()
    row = {
        "program": name,
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "given away": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "exchanges": dict(Counter(EXCHANGE.findall(compiled.as_text()))),
        "xla_bytes_accessed": int(compiled.cost_analysis()["bytes accessed"]),
        "compile_seconds": round(time.perf_counter() - begun, 1),
    }
    row["total"] = (
        sum(row[part] for part in ("arguments", "outputs", "temporary", "code")) - row["given away"]
    )
    exchanges = ", ".join(f"{count} {kind}" for kind, count in row["exchanges"].items()) or "none"
    sizes = "".join(
        f"{row[part] / 1e9:8.2f}" for part in ("arguments", "outputs", "given away", "temporary", "total")
    )
    print(f"{name:38}{sizes}   {exchanges}", flush=True)
    return compiled, row


def prune_step(key: jax.Array, fine: Any, base: Any) -> Any:
    return dx.apply_delta(base, dx.prune(key, dx.compute_delta(fine, base), 0.99))


def measure(layers: int) -> dict[str, Any]:
    mesh = dx.make_mesh(devices=topologies.get_topology_desc(TOPOLOGY, platform="tpu").devices)
    model, shapes = build_model(read_model_config(LLAMA_2_7B | {"num_hidden_layers": layers}))
    params = unflatten_names({n: jax.ShapeDtypeStruct(s, jnp.bfloat16) for n, s in shapes.items()})
    shardings = dx.param_shardings(mesh, params)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings)
    on_device = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(params)
    )
    count = sum(x.size for x in jax.tree.leaves(params))
    print(f"{count / 1e9:.2f} B parameters, {on_device / 1e9:.2f} GB a device; GB a device:")
    print(f"{'':38}{'args':>8}{'outputs':>8}{'given':>8}{'temp':>8}{'total':>8}   exchanges between devices")
    rows = []

    key = jax.eval_shape(jax.random.key, 0)
    for name, donated, options in (
        ("prune step", (), None),
        ("prune step, base given away", 2, None),
        ("prune step, no prefetch", (), NO_PREFETCH),
    ):
        step = jax.jit(prune_step, out_shardings=shardings, donate_argnums=donated)
        compiled, row = compile_and_report(name, step, key, params, params, options=options)
        row["hbm_bytes"], row["floor_bytes"] = hbm_bytes(compiled.as_text()), 3 * on_device
        rows.append(row)

    ids = jax.ShapeDtypeStruct((ROWS, PROMPT), jnp.int32, sharding=batch_sharding(mesh))
    forward = jax.jit(lambda p, ids, mask: model(p, ids, mask).logits)
    rows.append(compile_and_report(f"forward, {ROWS} x {PROMPT}", forward, params, ids, ids)[1])
    stops = stop_tokens(2)
    read = jax.jit(lambda p, ids, mask: prefill(model, p, ids, mask, slots=PROMPT + NEW, stops=stops))
    compiled, row = compile_and_report(
        f"prefill, {ROWS} x {PROMPT}, {PROMPT + NEW} slots", read, params, ids, ids
    )
    rows.append(row)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(read, params, ids, ids),
        compiled.output_shardings,
    )
    write = jax.jit(lambda p, s: decode(model, p, s, NEW, stops=stops, pad=0), donate_argnums=1)
    rows.append(compile_and_report(f"decode, {ROWS} rows, up to {NEW} tokens", write, params, state)[1])

    for row in rows[:3]:
        hbm, xla = (row[part] / row["floor_bytes"] for part in ("hbm_bytes", "xla_bytes_accessed"))
        print(f"{row['program']:38} HBM traffic {hbm:.5f} x floor; XLA's bytes accessed {xla:.3f} x floor")
    return {
        "topology": TOPOLOGY,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu", "flax")},
        "python": platform.python_version(),
        "parameters": count,
        "dtype": "bfloat16",
        "parameter_bytes_per_device": on_device,
        "programs": rows,
    }


def restart_with_libtpu(folder: Path) -> None:
    """Restarts this script with libtpu on its path, which JAX searches at import."""
    wanted = next(r.split(";")[0] for r in importlib.metadata.requires("jax") or () if r.startswith("libtpu"))
    target = folder / "libtpu"
    if not (target / "ready").exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
        subprocess.run([*pip, wanted], check=True)
        (target / "ready").touch()
    path = os.pathsep.join([str(target), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT | {"PYTHONPATH": path})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where libtpu is installed")
    parser.add_argument("--layers", type=int, default=32, help="fewer than 32 for a quick check")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None or any(
        os.environ.get(k) != v for k, v in ENVIRONMENT.items()
    ):
        restart_with_libtpu(options.folder)
    report = measure(options.layers)
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
