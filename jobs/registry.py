"""The model registry: what is registered, what is and was in production, and how to change it.

python -m jobs.registry list                                        # versions, aliases, figures
python -m jobs.registry history                                     # what was in production, why and by whom
python -m jobs.registry promote models:/kraken/7 --reason "..."     # deploy it through the gates, as the champion
python -m jobs.registry rollback --reason "..."                     # deploy the champion before this one again
"""

import argparse
import dataclasses
import json

from jobs.command import LineParser, absolute_storage, default_storage, run_job
from kraken.config import DEFAULT_APPLICATION, ConfigError
from kraken.manifest import ArtefactError
from kraken.storage import local_artefact
from pipelines.gates import GATES_TAG
from pipelines.registry import CHAMPION, SCHEME, Registry, Version
from pipelines.table import columns


def main(argv: list[str]) -> None:
    parser = LineParser(
        prog="python -m jobs.registry", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (
        ("list", "the versions of a registered name"),
        ("history", "every change of the champion"),
        ("promote", "deploy a version through the gates; it becomes the champion once it answers"),
        ("rollback", "deploy the champion before the present one again, without comparing the two"),
    ):
        sub = commands.add_parser(command, help=text, description=text, allow_abbrev=False)
        sub.add_argument("--storage", default=default_storage(), help="(storage)")
        if command == "promote":
            sub.add_argument("model", metavar="MODEL", help="models:/NAME/VERSION or models:/NAME@ALIAS")
            sub.add_argument("--force", action="append", default=[], metavar="GATE=REASON", help="a gate that may fail")
        else:
            sub.add_argument("--name", default=DEFAULT_APPLICATION, help=f"registered name ({DEFAULT_APPLICATION})")
        if command in ("list", "history"):
            sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
        else:
            sub.add_argument("--reason", required=True, metavar="TEXT", help="why, for the history")
    options = parser.parse_args(argv)
    storage = absolute_storage(options.storage)
    match options.command:
        case "list":
            print(_list(Registry(storage), options.name, options.json))
        case "history":
            print(_history(Registry(storage), options.name, options.json))
        case "promote":
            _deploy(options.model, storage, options.reason, tuple(options.force))
        case _:
            _deploy(_before(Registry(storage), options.name), storage, options.reason, None)


def _list(registry: Registry, name: str, as_json: bool) -> str:
    versions = registry.versions(name)
    if not versions:
        names = ", ".join(registry.names()) or "none"
        raise ConfigError(f"--name={name}: nothing is registered under it; the names there are: {names}")
    if as_json:
        return json.dumps([{**dataclasses.asdict(v), "state": state(v)} for v in versions], indent=2, default=dict)
    rows = [("version", "alias", "perplexity", "parity", "model", "registered", "run", "state")]
    for version in versions:
        tags = version.tags
        rows.append(
            (
                str(version.number),
                ",".join(version.aliases) or "-",
                f"{float(tags.get('kraken.perplexity', 'nan')):.4g}",
                f"{float(tags.get('kraken.parity_max_abs_diff', 'nan')):.1e}",
                tags.get("kraken.exchange", "?")[:16],
                version.created_at,
                tags.get("kraken.pipeline", "?"),
                state(version),
            )
        )
    return columns(rows)


def state(version: Version) -> str:
    """What became of a version: its last gates, and whether its model is still there."""
    gates = version.tags.get(GATES_TAG, "not judged")
    try:
        location = version.lineage.location
        if "://" in location or (local_artefact(location) / "manifest.json").is_file():
            return gates
        return f"{gates}; removed from {location}"
    except ArtefactError as error:
        return str(error).partition(";")[0]


def _history(registry: Registry, name: str, as_json: bool) -> str:
    events = registry.history(name)
    if as_json:
        return "\n".join(json.dumps(dataclasses.asdict(event)) for event in events)
    rows = [("when", "action", "version", "before", "who", "where", "why")]
    for e in events:
        rows.append((e.at, e.action, str(e.version), str(e.previous or "-"), e.who, e.where or "-", e.why))
    return columns(rows)


def _before(registry: Registry, name: str) -> str:
    """The version that was in production before the present champion."""
    champion, events = registry.champion(name), registry.history(name)
    if champion is None:
        raise ConfigError(f"--name={name} has no champion to roll back from; `list` shows its versions")
    earlier = [event.previous for event in events if event.version == champion.number and event.previous is not None]
    if not earlier:
        raise ConfigError(
            f"--name={name}: no version was in production before {champion.uri}; promote another one instead"
        )
    return f"{SCHEME}{name}/{earlier[-1]}"


def _deploy(reference: str, storage: str, reason: str, force: tuple[str, ...] | None) -> None:
    from pipelines import registered

    version = registered.deploy(reference, storage, reason, force)
    print(f"{version.uri} is deployed, and {SCHEME}{version.name}@{CHAMPION}")


if __name__ == "__main__":
    run_job(main)
