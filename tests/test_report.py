"""darex report: pages that load nothing, escape everything, and say what is so."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise

import jax
import numpy as np
import pytest
from click.testing import CliRunner

import darex_jax as dx
from darex_jax.cli import main
from darex_jax.core.errors import DarexError
from darex_jax.core.tree import flatten_names
from darex_jax.files.artifact import DeltaFile
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.study.draw import figure_rows, number_text
from darex_jax.study.leaves import leaves_of
from darex_jax.study.of_delta import delta_page
from darex_jax.study.page import html_of, write_page
from darex_jax.study.shown import Figure, Finding, Page, Section, Series, Table

VOID = {"meta", "link", "br", "hr", "img", "input", "col"}
SCRIPT = "<script>alert(1)</script>"


def some_page():
    """A page with everything that a page can have."""
    sizes, methods = (10.0, 50.0, 100.0, 1000.0), ("DARE", "DAREx-q", "SVD of allocated ranks, in 4 bits")
    lines = Figure(
        "Accuracy by size", "times smaller", "accuracy",
        (
            Series("DARE", sizes, (0.874, 0.7, 0.528, 0.5), (0.003, 0.02, 0.035, 0.01)),
            Series("SVD", sizes, (0.876, 0.875, 0.872, float("nan"))),
        ),
        log_x=True, levels=(("fine-tuned", 0.876), ("base", 0.509)), note="Means over four masks.",
    )  # fmt: skip
    bars = Figure(
        "Error by method", "method", "error",
        (
            Series("SST-2", (0, 1, 2), (99.0, 4.2, 0.3), (2.0, 0.2, 0.01)),
            Series("MRPC", (0, 1, 2), (98, 4, 0.4)),
        ),
        labels=methods, log_y=True, levels=(("nothing", 1.0),),
    )  # fmt: skip
    signed = Figure("Change", "method", "change", (Series("", (0, 1, 2), (-0.2, 0.0, 0.4)),), labels=methods)
    rows = (
        ("SST-2", "0.528 ± 0.035", "0.872 ± 0.002", "1/95"),
        ("MRPC", "0.196 ± 0.052", "0.827 ± 0.004", "1/95"),
        ("CoLA", "0.011 ± 0.061", "0.15 ± 0.01", "1/95"),
        ("STS-B", "0.063 ± 0.1", "0.893 ± 0.001", "1/95"),
    )
    best = frozenset((i, 2) for i in range(4))
    table = Table("All tasks", ("task", "DARE", "SVD, 4 bits", "size"), rows, "Means and deviations.", best)
    long = Table("Many rows", ("name", "words"), [(f"row {i}", "some words") for i in range(60)])
    findings = tuple(
        Finding(f"A claim {verdict}", verdict, "0.874 ± 0.003 against 0.876.", "DARE, arXiv:2311.03099")
        for verdict in ("held", "held partly", "not seen", "not testable here")
    )
    sections = (
        Section("Claims", ("What became of each.",), findings=findings),
        Section(
            "Figures", figures=(lines, bars, signed), tables=(table, long), command="darex report OUT.html"
        ),
    )
    return Page("What survives", ("The first sentence.", "The second."), sections, (("jax", "0.10.2"),))


class Seen(HTMLParser):
    """What a page has; a tag that does not fit fails."""

    def __init__(self, html):
        super().__init__()
        self.open, self.starts, self.texts = [], [], Counter()
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.starts.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.starts.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.texts[self.open[-1] if self.open else ""] += 1

    def of(self, tag):
        return [attrs for name, attrs in self.starts if name == tag]


def check(html):
    """What holds of every page."""
    assert html.startswith("<!doctype html>")
    seen = Seen(html)
    for tag, attrs in seen.starts:
        assert not {"src", "srcset", "data", "action", "poster", "xlink:href"} & attrs.keys(), tag
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        if tag == "a":
            assert re.match(r"#|https://", attrs["href"])
        else:
            assert "href" not in attrs, tag
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.S)
    assert "@import" not in style and "url(" not in style
    assert len(re.findall("<script", html)) == 1  # the page's own
    assert seen.of("html") == [{"lang": "en"}] and len(seen.of("main")) == 1
    levels = [int(tag[1]) for tag, _ in seen.starts if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    ids = [attrs["id"] for _, attrs in seen.starts if "id" in attrs]
    assert len(ids) == len(set(ids))
    for attrs in seen.of("svg"):
        assert attrs.get("aria-hidden") == "true" or (
            attrs["role"] == "img" and len(attrs["aria-label"]) > 20
        )
    for figure in re.findall(r"<figure.*?</figure>", html, re.S):
        assert "<figcaption>" in figure and re.search(r"<details>.*<table>", figure, re.S)
    assert len(seen.of("caption")) == len(seen.of("table"))
    assert all(attrs.get("scope") in ("col", "row") for attrs in seen.of("th"))
    for attrs in seen.of("div"):
        if attrs.get("class") == "scroll":
            assert attrs["tabindex"] == "0" and attrs["role"] == "region" and attrs["aria-label"]
    return seen


def darex(*arguments):
    return CliRunner().invoke(main, [*map(str, arguments)])


def prune(folder, out, *options):
    made = darex("prune", folder / "base", folder / "fine", out, *options)
    assert made.exit_code == 0, made.output
    return out


def report_of(folder, tmp_path, *options):
    """The page of a delta of a pair, as a file."""
    delta, page = (
        prune(folder, tmp_path / "delta", "--method", "svd", "--drop-rate", "0.8"),
        tmp_path / "page.html",
    )
    made = darex(
        "report", page, "--delta", delta, "--base", folder / "base", "--fine", folder / "fine", *options
    )
    assert made.exit_code == 0, made.output
    return page


def test_a_page_with_everything(tmp_path):
    html = html_of(some_page())
    seen = check(html)
    assert len(seen.of("figure")) == 3 and len(seen.of("table")) == 5
    assert [text for text in ("✓", "◐", "✕", "○") if text in html] == ["✓", "◐", "✕", "○"]
    assert "https://arxiv.org/abs/2311.03099" in html
    assert html.count('<span class="hidden"> (best)</span>') == 4
    assert '0.872 <span class="dev">± 0.002</span>' in html
    assert html.index("The first sentence") < html.index("<main")
    assert html == html_of(some_page())
    assert len(html) < 100_000
    write_page(some_page(), tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == html and len(list(tmp_path.iterdir())) == 1


def test_texts_are_texts():
    bad = f"{SCRIPT}\"'><img src=x onerror=alert(1)>&amp;‮\x00{{{{ 7 * 7 }}}}]]>"
    series = (Series(bad, (0.0, 1.0), (1.0, 2.0)), Series(bad, (0.0, 1.0), (2.0, 1.0)))
    lines = Figure(bad, bad, bad, series, levels=((bad, 1.5),), note=bad)
    bars = Figure(bad, bad, bad, series, labels=(bad, bad), note=bad)
    finding = Finding(bad, "held", bad, bad)
    table = Table(bad, (bad, bad), ((bad, f"{bad} ± {bad}"),), bad, frozenset({(0, 1)}))
    page = Page(
        bad, (bad, bad), (Section(bad, (bad,), (lines, bars), (table,), (finding,), bad),), ((bad, bad),)
    )
    html = html_of(page)
    seen = check(html)
    assert "<img" not in html and "onerror" not in str([attrs.keys() for _, attrs in seen.starts])
    assert "‮" not in html and "\x00" not in html and r"\u202e" in html
    assert "{{ 7 * 7 }}" in html
    assert "<code>x &lt; y</code>" in html_of(Page("p", ("where `x < y`",), ()))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("labels", [(), ("a", "b", "c")])
def test_figures_of_odd_numbers(log, labels):
    for values in (
        (0.0, 0.0, 0.0),
        (float("nan"),) * 3,
        (float("inf"), 1.0, -1.0),
        (1e-30, 1.0, 1e30),
        (5.0,) * 3,
    ):
        series = (Series("s", (0.0, 1.0, 2.0), values, (0.1, float("nan"), 2.0)),)
        figure = Figure("t", "x", "y", series, log_x=log, log_y=log, labels=labels, levels=(("level", 0.0),))
        html = html_of(Page("p", ("s",), (Section("s", figures=(figure,)),)))
        check(html)
        assert not re.search(
            r'="[^"]*\b(nan|inf)\b[^"]*"', "".join(re.findall("<(?:path|line|rect)[^>]*>", html))
        )


def test_numbers_are_short():
    shown = {number_text(x) for x in (0, 0.5, 12345.6, 1e-5, 3.21e-5, 2.5e9, float("nan"), float("inf"))}
    times = "\N{MULTIPLICATION SIGN}"
    assert shown == {"0", "0.5", "12,346", "10⁻⁵", f"3.21{times}10⁻⁵", f"2.5{times}10⁹", "none", "∞"}
    heads, rows = figure_rows(
        Figure("t", "x", "y", (Series("", (0, 1), (2, 3), (0.5, 0.25)),), labels=("a", "b"))
    )
    assert heads == ["x", "y"] and rows == [["a", "2 ± 0.5"], ["b", "3 ± 0.25"]]


WAYS = {
    "format 1": ["--drop-rate", "0.7", "--q", "0.5"],
    "dare, 4 bits": ["--method", "dare", "--drop-rate", "0.7", "--bits", "4"],
    "magnitude": ["--method", "magnitude", "--drop-rate", "0.95"],
    "svd": ["--method", "svd", "--drop-rate", "0.8", "--bits", "4"],
    "sign": ["--method", "sign", "--bytes-per-parameter", "20"],
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_said_of_a_delta_is_so(folders, tmp_path, way):
    folder, delta = folders / "llama", tmp_path / "delta"
    prune(folder, delta, *WAYS[way])
    with Checkpoint(folder / "base") as b, Checkpoint(folder / "fine") as f, DeltaFile(delta) as d:
        leaves = {leaf.name: leaf for leaf in leaves_of(b, d, f, lambda _: None)}
        bytes_of_all = sum(leaf.size for leaf in leaves.values())
        held = [
            info.nbytes for name, info in d.tensors.items() if name == "parts" or name.startswith("values/")
        ]
    np.testing.assert_allclose(bytes_of_all, sum(held))
    base, fine = (flatten_names(dx.load_params(folder / name)) for name in ("base", "fine"))
    restored = flatten_names(dx.load_delta(delta))
    assert leaves.keys() == restored.keys()
    for name, leaf in leaves.items():
        moved, true = np.asarray(restored[name], np.float64), np.asarray(fine[name] - base[name], np.float64)
        assert leaf.entries == moved.size and leaf.nonzero == np.count_nonzero(moved)
        np.testing.assert_allclose(leaf.error, np.sum((true - moved) ** 2) / np.sum(true**2), rtol=1e-3)
        relative = np.sqrt(np.sum(moved**2) / np.sum(np.asarray(base[name], np.float64) ** 2))
        np.testing.assert_allclose(leaf.relative, relative, rtol=1e-4)
        assert bool(leaf.ranks) == (leaf.nonzero > 0)
        if leaf.ranks:
            np.testing.assert_allclose(leaf.rank, np.sum(moved**2) / np.linalg.norm(moved, 2) ** 2, rtol=5e-3)
    thin = {"format 1": 0.3, "dare, 4 bits": 0.3, "magnitude": 0.05, "sign": 1.0}
    if way in thin:
        share = sum(leaf.numbers for leaf in leaves.values()) / sum(leaf.entries for leaf in leaves.values())
        assert abs(share - thin[way]) < 0.02


def test_an_encoder_with_a_task(folders, tmp_path):
    folder = folders / "bert"
    delta, page = prune(folder, tmp_path / "delta", "--drop-rate", "0.5"), tmp_path / "page.html"
    line = ["report", page, "--delta", delta, "--base", folder / "base", "--fine", folder / "fine",
            "--task", "opinions", "--limit", 40]  # fmt: skip
    made = darex(*line, "--json")
    assert made.exit_code == 0, made.output
    said = json.loads(made.stdout)
    assert said["out"] == str(page) and said["bytes"] == page.stat().st_size and said["warnings"] == []
    html = page.read_text()
    check(html)
    score = json.loads(
        darex("eval", folder / "base", "--delta", delta, "--task", "opinions", "--limit", 40, "--json").stdout
    )
    assert f"{score['metric']:.4f}" in html and f"{score['metric']:.3f} restored" in html
    assert "agreement of predictions" in html and "base alone" in html
    assert "How the restored model does" in html and "word_embeddings" in html
    again = darex(*line)
    assert again.exit_code == 1 and again.output == f"Error: {page} exists; --overwrite replaces it.\n"
    shown = darex(*line, "--overwrite")
    assert shown.exit_code == 0 and shown.stdout.splitlines()[-1].startswith(f"Written: {page}")
    assert page.read_text() == html.replace(" --limit 40 --json", " --limit 40")


def test_a_decoder(folders, tmp_path):
    page = report_of(folders / "llama", tmp_path)
    html = page.read_text()
    check(html)
    assert "How the restored model does" not in html
    assert "self_attn.q_proj" in html and "mlp.down_proj" in html and "Error of the delta" in html
    folder = folders / "llama"
    texts = tmp_path / "texts"
    texts.write_text("one line\nand another one\n")
    plain = [
        "report",
        tmp_path / "b.html",
        "--delta",
        tmp_path / "delta",
        "--base",
        folder / "base",
        "--text",
        texts,
    ]
    assert darex(*plain, "--fine", folder / "fine").exit_code == 0
    check(found := (tmp_path / "b.html").read_text())
    assert "agreement of next tokens" in found and "share of right tokens" in found


def test_names_of_a_delta_cannot_write_the_page(tmp_path):
    names = (f"layers.0.{SCRIPT}", "layers.1.<img src=x onerror=alert(1)>", "layers.2.{{ 7 * 7 }}")
    keys = jax.random.split(jax.random.key(0), 2 * len(names))
    base = {name: jax.random.normal(key, (16, 8)) for name, key in zip(names, keys, strict=False)}
    fine = {
        name: base[name] + jax.random.normal(key, (16, 8))
        for name, key in zip(names, keys[::-1], strict=False)
    }
    for folder, tree in (("base", base), ("fine", fine)):
        dx.save_params(tmp_path / folder, tree, {"model_type": SCRIPT, "note": SCRIPT, "of": folder})
    made = darex("prune", tmp_path / "base", tmp_path / "fine", tmp_path / f"{SCRIPT.replace('/', '')}",
                 "--drop-rate", "0.5", "--include", "layers")  # fmt: skip
    assert made.exit_code == 0, made.output
    page = delta_page(
        tmp_path / SCRIPT.replace("/", ""), tmp_path / "base", fine=tmp_path / "fine", command=SCRIPT
    )
    html = html_of(page)
    seen = check(html)
    assert "alert(1)&lt;" in html and "{{ 7 * 7 }}" in html
    assert not seen.of("img")


def test_another_model_is_refused_and_nothing_is_written(folders, tmp_path):
    folder, other = folders / "llama", folders / "bert"
    delta, page = prune(folder, tmp_path / "delta", "--drop-rate", "0.9"), tmp_path / "page.html"

    def fails(*options):
        result = darex("report", *options)
        assert result.exit_code in (1, 2) and "Traceback" not in result.output
        assert {path.name for path in tmp_path.iterdir()} == {"delta"}
        return result.output.splitlines()[-1].removeprefix("Error: ")

    given = ["--delta", delta, "--base", folder / "base"]
    assert fails(page, "--delta", delta, "--base", other / "base").startswith(
        f"{other / 'base'} is not the base of {delta}: "
    )
    assert fails(page, "--delta", delta, "--base", folder / "fine").startswith(
        f"this is not the base that {delta} was made from: "
    )
    assert fails(page, *given, "--fine", other / "fine").startswith(
        f"{other / 'fine'} is not what this delta was made from: it has no 'model.layers.0."
    )
    assert fails(page, *given, "--task", "sst2").endswith(f"the model of {delta} is a llama.")
    assert fails(page) == "a page is of RESULTS or of a --delta: say one."
    assert fails(tmp_path / "results", page, *given) == "a page is of RESULTS or of a --delta: say one."
    assert fails(page, "--delta", delta) == "--delta takes --base, the model that it was made from."
    assert fails(tmp_path / "results", page, "--base", folder / "base") == "--base goes with --delta."
    assert fails(page, *given, "--limit", 3) == (
        "--data-dir and --limit are of examples: give --task, --text or --data."
    )
    assert fails(delta, *given) == f"the page is an HTML file: OUT ends in .html, {delta} does not."
    assert fails() == "give OUT.html, or RESULTS and OUT.html."
    assert str(tmp_path / "results") in fails(tmp_path / "results", page)
    texts = folders / "text"
    assert fails(page, *given, "--text", texts, "--task", "gsm8k") == (
        "examples come from one place: a task, a text file, or --data."
    )


def test_texts_without_labels_want_the_fine_tuned_model(folders, tmp_path):
    from darex_jax.tasks.source import Source

    folder = folders / "bert"
    delta = prune(folder, tmp_path / "delta", "--drop-rate", "0.9")
    with pytest.raises(DarexError, match="compared with the fine-tuned model's answers: give --fine"):
        delta_page(delta, folder / "base", source=Source(text=folders / "text"))
    page = delta_page(delta, folder / "base", fine=folder / "fine", source=Source(text=folders / "text"))
    assert page.summary[1].startswith("Agreement of predictions on ")
