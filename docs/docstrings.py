"""Docstrings as Markdown. Their sections are compact, sometimes on one line; no parser of a style reads that.

Args: a, b: what they are; c: another.     ->  **Args**, and a list of `a`, `b` and `c`
Returns: a tree.                           ->  **Returns** a tree.
"""

import re
from pathlib import Path

import griffe

PUBLIC = re.findall(r"import (\w+) as", (Path(__file__).parent.parent / "darex_jax/__init__.pyi").read_text())
SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Source):(?: +(.*)|)$")
LISTED = ("Args", "Attributes")  # sections that are lists of names
NAMES = r"(\w+(?:, \w+)*): "


class Sections(griffe.Extension):
    def on_object(self, *, obj, **_):
        if not obj.is_alias and obj.docstring:
            parameters = getattr(obj, "parameters", None) or []
            obj.docstring.value = as_markdown(obj.docstring.value, {p.name.lstrip("*") for p in parameters})


def as_markdown(text, parameters=frozenset()):
    """`parameters`: the names that begin an item where several stand in one line."""
    text = re.sub(r"^(\S.*\.) (Returns|Raises|Source): ", r"\1\n\2: ", text, flags=re.M)
    blocks, lines = [], text.splitlines()
    while lines:
        section = SECTION.match(lines[0])
        end = 1
        while (
            end < len(lines)
            and not SECTION.match(lines[end])
            and (not section or lines[end][:1] in ("", " "))
        ):
            end += 1
        block, lines = lines[:end], lines[end:]
        if section:
            body = [section[2] or "", *block[1:]]
            blocks.append(of_section(section[1], body, parameters))
        else:
            blocks.append(prose(block))
    return "\n\n".join(blocks)


def of_section(title, body, parameters):
    """The title, what stands before the first item, the items, and what follows them."""
    rest = [line for line in body[1:] if line.strip()]
    indent = min((len(line) - len(line.lstrip()) for line in rest), default=0)
    before, items, after = body[0], [], ""
    for line in rest:
        text, outer = line.strip(), len(line) - len(line.lstrip()) == indent
        if outer and re.match(NAMES, text) and (title == "Returns" or (title in LISTED and not body[0])):
            items.append(text)
        elif (items and outer) or after:
            after += " " + text
        elif items:
            items[-1] += " " + text
        else:
            before += " " + text
    if title in LISTED:
        items, before = [part for text in (before, *items) for part in split(text, parameters)], ""
    lead = f"**{title}** {inline(before)}".strip()
    return "\n".join([lead, "", *(f"- {named(text)}" for text in items), "", inline(after).strip()]).strip()


def split(text, parameters):
    """`a: x; b: y` in two, where both are parameters."""
    starts = [0]
    for match in re.finditer(r"(?<=[;.] )" + NAMES, text):
        if set(match[1].split(", ")) <= parameters:
            starts.append(match.start(1))
    parts = [text[a:b].strip().removesuffix(";") for a, b in zip(starts, [*starts[1:], None], strict=True)]
    return [part for part in parts if part]


def named(text):
    match = re.match(NAMES, text)
    if not match:
        return inline(text)
    return ", ".join(f"`{name}`" for name in match[1].split(", ")) + ": " + inline(text[match.end() :])


def prose(lines):
    """Paragraphs; what is indented is code."""
    found, code = [], False
    for line in lines:
        if line.strip() and line.startswith("    ") != code:
            code = not code
            while not code and not found[-1]:
                found.pop()
            found.append("```python" if code else "```\n")
        found.append(line[4:] if code else inline(line))
    return "\n".join(found).rstrip() + ("\n```" if code else "")


def inline(text):
    """Names of the reference as links, and nothing read as Markdown that is none."""
    spans = re.split(r"(`[^`]*`)", text)
    for i, span in enumerate(spans):
        if i % 2 == 0:
            spans[i] = re.sub(r"([*<\[\]])", r"\\\1", span)
        elif span.strip("`") in PUBLIC:
            spans[i] = f"[{span}][darex_jax.{span.strip('`')}]"
    return "".join(spans)
