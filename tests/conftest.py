"""Settings every test runs under: offline, eight simulated CPU devices, and JAX at its strictest.

Compiled programs are kept on disk, shared by the workers and by the processes that tests start: the same tiny
models are compiled again and again, which is most of what the suite takes. They are compiled without most
optimizations, but for the modules where bits are what is tested (`OPTIMIZED`); as in use everywhere with
`JAX_DISABLE_MOST_OPTIMIZATIONS=0 make test`.
"""

import os
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{Path(__file__).parent.parent}/.pytest_cache/jax")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
OPTIMIZED = ("test_adamr", "test_artifact", "test_delta", "test_demo", "test_format1", "test_importance",
             "test_lowering", "test_mask", "test_multihost", "test_sharding", "test_train",
             "test_transforms")  # fmt: skip
KEYS = ("test_bert", "test_causal_lm", "test_delta", "test_generate", "test_lora", "test_mask", "test_train")


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=1000, help="how many changed artifacts test_fuzz.py reads")


@pytest.fixture(autouse=True, scope="module")
def _compiled_as_in_use(request):
    """Where bits are what is tested, XLA optimizes; where keys are drawn, JAX sees that none is used twice.

    The latter goes through Python at every call: it is not on everywhere.
    """
    name = request.module.__name__.rpartition(".")[2]
    jax.config.update("jax_debug_key_reuse", name in KEYS)
    changes = name in OPTIMIZED and os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0"
    if changes:
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", False)
    yield
    if changes:
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("default", category=DeprecationWarning)
        warnings.filterwarnings("default", category=ResourceWarning)
        yield


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Base and fine-tune of a tiny BERT and a tiny Llama, with tokenizers made on the spot."""
    transformers = pytest.importorskip("transformers")
    import jax.numpy as jnp
    import numpy as np
    from tokenizers import Tokenizer, models, pre_tokenizers

    import darex_jax as dx
    from darex_jax.evaluation.classification import predict
    from darex_jax.models import init_model, read_model_config
    from darex_jax.tasks import load_task
    from darex_jax.tasks.batching import encode, evaluation_batches
    from tests.test_calibration import FAMILIES
    from tests.test_choose_q import of_two_classes

    root = tmp_path_factory.mktemp("pairs")
    for family in ("bert", "llama"):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
        config = FAMILIES[family] | {"vocab_size": 259, "max_position_embeddings": 512}
        model, base = init_model(read_model_config(config), jax.random.key(0))
        fine = jax.tree.map(lambda x: x + 0.1 * jnp.sin(200 * x), base)
        if family == "bert":
            some = load_task("opinions").validation.select(slice(6))
            batches = evaluation_batches(encode(fast, some))
            fine = of_two_classes(model, fine, batches)
            by_class = np.array(some.texts)[predict(model, fine, batches).argmax(-1).argsort()]
        for name, params in (("base", base), ("fine", fine)):
            dx.save_params(root / family / name, params, model.config.to_hf())
            fast.save_pretrained(root / family / name)
    (root / "text").write_text(f"{by_class[0]}\n\n{by_class[1]}\n{by_class[-1]}\n", encoding="utf-8")
    return root
