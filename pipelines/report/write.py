"""Writing a report: its files in the storage, and in the pipeline's MLflow run."""

from collections.abc import Mapping
from pathlib import Path

from kraken.manifest import make_fingerprint, write_atomically
from kraken.storage import Storage, join
from pipelines.report import content, figures
from pipelines.report.document import Picture, to_html, to_markdown
from pipelines.report.facts import Facts

FOLDER = "reports"
"""Folder of the storage that holds a folder for each pipeline's report."""
HTML_NAME, MARKDOWN_NAME = "report.html", "report.md"


def report_name(name: str, fingerprints: Mapping[str, str]) -> str:
    """Name of a report's folder: a pipeline has one report, which a later run of it replaces.

    Args:
        name: of the pipeline.
        fingerprints: of its stages by kind.
    """
    return make_fingerprint("report", name, fingerprints)[:16]


def report_location(storage: str, name: str) -> str:
    """Path or URI of a report's HTML.

    Args:
        name: of its folder.
    """
    return join(storage, FOLDER, name, HTML_NAME)


def write(facts: Facts, storage: Storage, name: str) -> list[Path]:
    """Write `report.html`, `report.md` and the figures.

    Args:
        name: of the report's folder.

    Returns:
        The files on this machine; those of a remote storage are copied there, too.
    """
    folder = storage.folder(FOLDER, name)
    pictures: dict[str, Picture] = {}
    for figure_name, draw in figures.FIGURES.items():
        if figure := draw(facts):
            svg = figures.save(figure, figure_name, folder)
            pictures[figure_name] = Picture(svg, f"{figure_name}.png", content.CAPTIONS[figure_name])
    document = content.build(facts, pictures)
    write_atomically(folder / HTML_NAME, to_html(document))
    write_atomically(folder / MARKDOWN_NAME, to_markdown(document))
    paths = [*(folder / picture.path for picture in pictures.values()), folder / MARKDOWN_NAME, folder / HTML_NAME]
    storage.publish_files(paths)
    return paths
