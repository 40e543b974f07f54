"""Which parameters are pruned: families, patterns, and limits of patterns."""

import pytest

from darex_jax.core.scope import LONGEST_PATTERN, choose_scope, compile_pattern

NAMES = (
    "bert.encoder.layer.0.output.dense.weight",
    "bert.encoder.layer.1.output.dense.bias",
    "classifier.bias",
)


def chosen(*args, **patterns):
    return [name for name in NAMES if choose_scope(*args, **patterns)(name)]


def test_patterns_override_the_family():
    assert chosen("bert") == list(NAMES[:2])
    assert chosen("bert", include=[r"\.bias$"]) == list(NAMES[1:])
    assert chosen("bert", exclude=[r"layer\.0\."]) == [NAMES[1]]
    assert chosen("bert", include=["bias"], exclude=["^classifier"]) == [NAMES[1]]
    assert chosen(None, include=["(?i)CLASSIFIER"]) == [NAMES[2]]
    with pytest.raises(ValueError, match=r"no default scope for model_type 'gpt2'.*--include REGEX"):
        choose_scope("gpt2")


def test_an_unknown_family_is_pruned_in_the_matrices_of_its_repeated_blocks():
    shapes = {
        "shared.weight": (9, 4),
        "encoder.block.0.layer.0.q.weight": (4, 4),
        "encoder.block.1.layer.0.q.weight": (4, 4),
        "encoder.block.0.layer.0.relative_attention_bias.weight": (4, 2),  # in the first block only
        "encoder.block.0.layer.0.layer_norm.weight": (4,),
        "encoder.block.1.layer.0.layer_norm.weight": (4,),
        "blocks.experts.0.w1.weight": (3, 4),
        "blocks.experts.1.w1.weight": (3, 4),
        "layers.0.embed_positions.weight": (9, 4),
        "layers.1.embed_positions.weight": (9, 4),
        "conv1.weight": (4, 3, 3),
        "lm_head.weight": (9, 4),
    }

    def pruned(shapes, **patterns):
        return [name for name in shapes if choose_scope("t5", **patterns, shapes=shapes)(name)]

    blocks = [n for n in shapes if n.endswith(("q.weight", "w1.weight"))]
    assert pruned(shapes) == blocks
    assert pruned(shapes, exclude=["experts"]) == blocks[:2]
    assert pruned(shapes, include=["conv1"]) == ["conv1.weight"]
    linen = {f"layers_{i}.kernel": (4, 4) for i in range(2)} | {
        "embed.embedding": (9, 4),
        "out.kernel": (4, 9),
    }
    assert pruned(linen) == ["layers_0.kernel", "layers_1.kernel"]
    one_block = {"h.0.attn.weight": (4, 4), "h.0.ln.weight": (4,), "wte.weight": (9, 4), "out.weight": (4, 4)}
    assert pruned(one_block) == ["h.0.attn.weight"]
    assert pruned({"proj.weight": (4, 4), "embed.weight": (9, 4)}) == ["proj.weight"]


def test_patterns_take_linear_time():
    """Each of these takes exponential time in Python's engine, and linear time in RE2."""
    text = "a" * 3_000 + "!"
    for pattern in ("(a+)+$", "(a|aa)+$", "(.*)*x", "(a?){1000}a{1000}x"):
        assert not compile_pattern(pattern).search(text)
    assert compile_pattern("(a+)+").fullmatch("aaa") and not compile_pattern("a").fullmatch("aaa")
    assert compile_pattern("(" * 4_999 + ")" * 4_999).search(text)  # thousands of groups, none remembered


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("a{99999999999}", "invalid repetition size"),
        ("a{2,99999999999}", "invalid repetition size"),
        ("a{1001}", "invalid repetition size"),
        ("((a{100}){100}){100}", "invalid repetition size"),
        ("(" * 30, "missing )"),
        ("[a", "missing ]"),
        ("*a", "no argument for repetition operator"),
        ("(?=a)b", r"invalid perl operator: (?="),
        ("(?<!a)b", r"invalid perl operator: (?<"),
        (r"(a)\1", r"invalid escape sequence: \1"),
        ("a" * (LONGEST_PATTERN + 1), "at most 10,000 are accepted"),
        ("\udcff", "can't encode character"),
    ],
)
def test_unsupported_patterns_are_explained_in_one_line(pattern, why, capfd):
    for patterns in ({"include": [pattern]}, {"exclude": ["fine", pattern]}):
        with pytest.raises(ValueError) as caught:
            choose_scope("bert", **patterns)
        message = str(caught.value)
        assert "is not supported by RE2: " in message and "without look-ahead" in message
        assert why in message and "\n" not in message and len(message) < 320
    assert capfd.readouterr().err == ""  # RE2's own error log is disabled
