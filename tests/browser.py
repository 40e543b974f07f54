"""A page of `darex report` in a real browser: `make check-report`, or `python tests/browser.py PAGE OUT`.

Chromium shows it at three widths, light and dark, and on paper. It must fit, load nothing, and pass
axe-core's accessibility rules. Screenshots and a PDF stay in the folder `pages` of
pytest's cache, to be looked at.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM, DRIVER, NPM = (shutil.which(name) for name in ("chromium", "chromedriver", "npm"))
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
         "--host-resolver-rules=MAP * ~NOTFOUND")  # fmt: skip
WIDTHS = (360, 820, 1440)
SERIOUS = ("serious", "critical")
PAGES = Path(__file__).parent.parent / ".pytest_cache" / "pages"


class Tab:
    """A tab of Chromium, by chromedriver's HTTP interface."""

    def __init__(self, port, profile):
        self.root = f"http://127.0.0.1:{port}"
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL"}}
        found = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.root += f"/session/{found['sessionId']}"

    def _call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def open(self, url):
        self._call("POST", "/url", {"url": url})

    def run(self, script, *args):
        return self._call("POST", "/execute/sync", {"script": script, "args": list(args)})

    def run_async(self, script):
        return self._call("POST", "/execute/async", {"script": script, "args": []})

    def devtools(self, command, **params):
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def requests(self):
        """The URLs asked for since the last call."""
        lines = self._call("POST", "/se/log", {"type": "performance"})
        events = [json.loads(line["message"])["message"] for line in lines]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def close(self):
        self._call("DELETE", "")


@contextmanager
def chromium(folder):
    process = subprocess.Popen(
        [DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        port = next(
            line.split("port ")[1].rstrip(".\n") for line in process.stdout if "successfully on" in line
        )
        tab = Tab(int(port), folder / "profile")
        try:
            yield tab
        finally:
            tab.close()
    finally:
        process.terminate()
        process.wait()


def axe(folder):
    """axe-core's script, of npm's package."""
    run = subprocess.run([NPM, "pack", "axe-core@4", "--silent"], cwd=folder, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("npm cannot fetch axe-core")
    with tarfile.open(folder / run.stdout.strip().splitlines()[-1]) as archive:
        return archive.extractfile("package/axe.min.js").read().decode()


def look(tab, page, out, axe_script=None):
    """What is wrong with a page, as sentences; its pictures are left in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    url, wrong = page.resolve().as_uri(), []
    tab.requests()
    tab.open(url)
    for scheme in ("light", "dark"):
        tab.devtools(
            "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
        )
        for width in WIDTHS:
            height = 900
            for _ in range(2):  # the whole page, once its height is known
                tab.devtools("Emulation.setDeviceMetricsOverride", width=width, height=height,
                             mobile=width < 500, deviceScaleFactor=1)  # fmt: skip
                height = tab.run_async(
                    "requestAnimationFrame(() => requestAnimationFrame(() =>"
                    " arguments[0](document.documentElement.scrollHeight)))"
                )
            wide, room = tab.run("return [document.documentElement.scrollWidth, innerWidth]")
            if wide > width or room > width:  # where a page is too wide, a phone shows all of it, smaller
                wrong.append(f"{width} {scheme}: the page is {wide} wide")
            picture = tab.devtools("Page.captureScreenshot", format="png")["data"]
            (out / f"{width}-{scheme}.png").write_bytes(base64.b64decode(picture))
            if axe_script is not None:
                tab.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
                tab.run(axe_script + "; window.axe = axe;")
                found = tab.run_async(
                    "const done = arguments[0]; axe.run(document).then((r) => done(r.violations))"
                )
                tab.run("document.querySelectorAll('details').forEach((d) => { d.open = false; })")
                for rule in found:
                    if rule["impact"] in SERIOUS:
                        where = "; ".join(node["html"][:120] for node in rule["nodes"][:3])
                        wrong.append(f"{width} {scheme}: {rule['id']}: {rule['help']}: {where}")
    tab.devtools("Emulation.clearDeviceMetricsOverride")
    paper = tab.devtools("Page.printToPDF", printBackground=True, preferCSSPageSize=True)["data"]
    (out / "paper.pdf").write_bytes(base64.b64decode(paper))
    wrong += [f"asked for {asked}" for asked in tab.requests() if asked != url]
    return wrong


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("there is no Chromium with its driver (Debian: chromium, chromium-driver)")
    with chromium(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


@pytest.fixture(scope="module")
def axe_script(tmp_path_factory):
    if NPM is None:
        pytest.skip("there is no npm to fetch axe-core with")
    return axe(tmp_path_factory.mktemp("axe"))


def test_a_page_of_every_kind_of_content(tab, axe_script, tmp_path):
    from darex_jax.study.page import write_page
    from tests.test_report import some_page

    write_page(some_page(), tmp_path / "page.html")
    assert not look(tab, tmp_path / "page.html", PAGES / "study", axe_script)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_page_of_a_delta(tab, axe_script, tmp_path, folders, family):
    from tests.test_report import report_of

    page = report_of(folders / family, tmp_path, *(["--task", "opinions"] if family == "bert" else []))
    assert not look(tab, page, PAGES / family, axe_script)


def test_a_figure_answers_a_pointer(tab, tmp_path):
    from darex_jax.study.page import write_page
    from tests.test_report import some_page

    write_page(some_page(), tmp_path / "page.html")
    tab.open((tmp_path / "page.html").as_uri())
    said = tab.run(
        "const hit = document.querySelector('svg.wide .hit');"
        "hit.dispatchEvent(new PointerEvent('pointermove', {bubbles: true, clientX: 40, clientY: 40}));"
        "return document.getElementById('tip').textContent"
    )
    assert "0.874 ± 0.003" in said
    tab.run("document.querySelector('.legend button').click()")
    assert tab.run("return document.querySelector('g[data-series=\"0\"]').classList.contains('faded')")
    tab.run("document.querySelectorAll('.tabled thead button')[1].click()")
    first = tab.run("return document.querySelector('.tabled tbody tr').cells[0].textContent")
    assert first == "CoLA"


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder, chromium(Path(folder)) as tab:
        begun = time.monotonic()
        for line in look(tab, Path(sys.argv[1]), Path(sys.argv[2]), axe(Path(folder)) if NPM else None):
            print(line)
        print(f"{time.monotonic() - begun:.0f} s", file=sys.stderr)
    os._exit(0)
