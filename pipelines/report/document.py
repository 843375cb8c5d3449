"""Documents of headings, tables, pictures and commands, as HTML in one file and as Markdown.

Both come from the same blocks, so that they hold the same numbers. All text is escaped.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

TEMPLATE = "report.html.jinja"


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


@dataclass(frozen=True, slots=True)
class Code:
    """Lines to copy into a shell."""

    text: str
    kind: str = "code"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of texts under a head; cells of numbers are aligned at the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()
    """Columns of numbers."""
    kind: str = "table"


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure: in the HTML as it is, in the Markdown as a link to its file beside the report."""

    svg: str
    """Made by this project: it is not escaped."""
    path: str
    """File of the figure, relative to the report."""
    alt: str
    """What it shows, in a sentence."""
    kind: str = "picture"


Block = Text | Code | Table | Picture


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with what is below it."""

    heading: str
    blocks: Sequence[Block]


@dataclass(frozen=True, slots=True)
class Document:
    """A title, a sentence or two, and sections."""

    title: str
    lead: Sequence[str]
    sections: Sequence[Section]
    warning: str = ""
    """Shown above everything else."""


def to_html(document: Document) -> str:
    """The document as one file that needs no network, in light and dark."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["trusted"] = Markup
    return environment.get_template(TEMPLATE).render(document=document)


def to_markdown(document: Document) -> str:
    """The document as Markdown with tables (GitHub's)."""
    parts = [f"# {escaped(document.title)}"]
    if document.warning:
        parts.append(f"**{escaped(document.warning)}**")
    parts += [escaped(line) for line in document.lead]
    for section in document.sections:
        parts.append(f"## {escaped(section.heading)}")
        parts += [_markdown(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Text):
        return escaped(block.text)
    if isinstance(block, Code):
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.text)), default=0))
        return f"{fence}\n{block.text}\n{fence}"
    if isinstance(block, Picture):
        return f"![{escaped(block.alt)}]({block.path})"
    rule = ["--:" if index in block.numeric else "---" for index in range(len(block.head))]
    rows = [[escaped(cell) for cell in row] for row in (block.head, *block.rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:]))


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))
