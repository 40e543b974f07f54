"""Pages of the site that are kept elsewhere: the README as the first one, and the tables of results."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
KINDS = {".md", ".png", ".svg", ".json", ".jsonl", ".html"}  # of results


def on_files(files, config):
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text()))
    results = [*ROOT.glob("experiments/results/**/*"), *ROOT.glob("benchmarks/results/**/*")]
    for path in sorted(path for path in results if path.suffix in KINDS):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links as they work in the repository become links of the site, where docs/ is the root."""
    here = page.file.src_uri
    folder = "" if here == "index.md" else "docs"
    if here.startswith(("experiments/", "benchmarks/")):
        return markdown

    def moved(match):
        link, anchor = match[1], match[2] or ""
        there = posixpath.normpath(posixpath.join(folder, posixpath.dirname(here), link))
        there = there.removeprefix("docs/")
        return f"]({posixpath.relpath(there, posixpath.dirname(here) or '.')}{anchor})"

    return re.sub(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)", moved, markdown)
