"""List what a storage holds and nothing refers to, and remove it when asked to.

python -m jobs.clean storage                          # a list with sizes and ages; changes nothing
python -m jobs.clean storage --remove                 # deletes what it lists, if nobody wrote to it for a day
python -m jobs.clean s3://bucket/kraken --remove --older-than 0.5 --unfinished

An artefact is kept while a run in MLflow, a registered version with an alias (models:/kraken@champion) or an endpoint
that answers refers to it, or to something that was made from it. Delete a run in MLflow to give its artefacts free.
Unfinished stages, which the same command would continue, go with --unfinished only. Links are never followed.
"""

import argparse
import dataclasses
import json

from jobs.command import LineParser, absolute_storage, run_job
from kraken.config import ConfigError
from kraken.storage import Storage
from pipelines import clean
from pipelines.clean import Item
from pipelines.registry import Registry
from pipelines.table import columns, duration, size

HOUR_S = 3600.0


def main(argv: list[str]) -> None:
    parser = LineParser(
        prog="python -m jobs.clean", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("storage", metavar="STORAGE", help="folder or URI that holds the artefacts")
    parser.add_argument("--remove", action="store_true", help="delete; otherwise nothing changes")
    parser.add_argument("--unfinished", action="store_true", help="also stages that were interrupted")
    parser.add_argument(
        "--older-than", type=float, default=24.0, metavar="HOURS", help="only what nobody wrote to for so long (24)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    if not options.older_than >= 0:
        raise ConfigError(f"--older-than={options.older_than} is negative; 0 takes everything")
    uri = absolute_storage(options.storage)
    storage, registry = Storage(uri), Registry(uri)
    survey = clean.survey(storage, clean.references(uri, registry))
    chosen = clean.removable(survey.items, options.older_than * HOUR_S, unfinished=options.unfinished)
    if options.json:
        print(
            json.dumps([dataclasses.asdict(item) | {"removable": item in chosen} for item in survey.items], default=str)
        )
    else:
        print(describe(survey, chosen))
    if not options.remove:
        return
    # asked again: a pipeline may have begun to use an artefact meanwhile
    again = {item.name for item in clean.survey(storage, clean.references(uri, registry)).items}
    clean.remove(
        storage, [item for item in chosen if item.name in again], lambda item: print(f"removed {item.name}", flush=True)
    )


def describe(survey: clean.Survey, chosen: list[Item]) -> str:
    """The items as a table, and their sums."""
    rows = [("what", "folder", "size", "age", "removable")]
    for item in sorted(survey.items, key=lambda item: -item.num_bytes):
        may_go = "yes" if item in chosen else "with --unfinished" if item.what == "unfinished" else "too young"
        rows.append((item.what, item.name, size(item.num_bytes), duration(item.age_s), may_go))
    total = sum(item.num_bytes for item in chosen)
    lines = [columns(rows)] if survey.items else []
    lines += [f"left alone, a link: {link}" for link in survey.links]
    return "\n".join(
        [*lines, f"{len(survey.kept)} artefacts are in use; {len(chosen)} folders, {size(total)}, could go (--remove)"]
    )


if __name__ == "__main__":
    run_job(main)
