"""Parsing and exit of the command lines: a preset's name, dotted overrides, errors in one line, exit statuses."""

import argparse
import contextlib
import dataclasses
import io
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NoReturn, TextIO, TypeVar

import tyro

from jobs.following import follow
from kraken.config import ConfigError, RunConfig
from kraken.environment import provide_home
from kraken.manifest import ArtefactError
from kraken.presets import PRESETS
from kraken.storage import is_remote
from pipelines.errors import ClusterError, RunStopped

USER_ERROR, FAILURE, INTERRUPTED, NO_READER = 2, 1, 130, 141
"""Exit statuses; the last two are what a shell reports of SIGINT and SIGPIPE."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """A run, and what is asked of it."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    dry_run: bool = False
    """Show the stages, and which would run, then stop."""


A = TypeVar("A", bound=Arguments)


def parse(prog: str, description: str, argv: list[str]) -> Arguments:
    """A preset varied by dotted overrides: `quickstart --train.steps 50`.

    Raises:
        ConfigError: unknown preset, unknown key, wrong type, or a value that fails its checks; one line.
        SystemExit: after `--help`.
    """
    names = ", ".join(PRESETS)
    wants_help = any(word in ("-h", "--help") for word in argv)
    if not argv and not wants_help:
        raise ConfigError(f"a preset is missing; choose from: {names} (for example `{prog} quickstart`)")
    name, overrides = (argv[0], argv[1:]) if not argv[0].startswith("-") else ("quickstart", argv)
    require_preset(name)
    if argv[0].startswith("-") and not wants_help:
        raise ConfigError(f"the preset comes first: `{prog} PRESET {argv[0]} ...`; choose from: {names}")
    about = f"{description}\n\nPRESET is one of: {names}. The defaults below are those of {name}."
    return parse_overrides(Arguments, name, f"{prog} PRESET", about, overrides)


def require_preset(name: str) -> None:
    """Refuse a preset that does not exist."""
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} does not exist; choose from: {', '.join(PRESETS)}")


def parse_overrides(kind: type[A], name: str, prog: str, description: str, overrides: list[str]) -> A:
    """Vary one preset; raises as `parse` does."""
    return vary(kind, dataclasses.replace(PRESETS[name](), storage=default_storage()), prog, description, overrides)


def default_storage() -> str:
    """The storage where none is given."""
    return os.environ.get("KRAKEN_STORAGE", "storage")


def vary(kind: type[A], preset: RunConfig, prog: str, description: str, overrides: list[str]) -> A:
    """Vary a run by dotted overrides, of which `--force` is short for `--gates.force`; raises as `parse` does."""
    overrides = [re.sub(r"^--force(?=$|=)", "--gates.force", word) for word in overrides]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            arguments = tyro.cli(
                kind, default=kind(config=preset), args=follow(preset, overrides), prog=prog, description=description
            )
    except SystemExit as error:
        if error.code:
            raise ConfigError(one_line(errors.getvalue())) from error
        raise
    storage = absolute_storage(arguments.config.storage)
    return dataclasses.replace(arguments, config=dataclasses.replace(arguments.config, storage=storage))


def absolute_storage(storage: str) -> str:
    """Make a storage path absolute, starting from the current folder.

    Raises:
        ConfigError: a relative path in a submitted job, whose current folder is a copy that ends with the session.
    """
    if is_remote(storage) or os.path.isabs(storage):
        return storage
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise ConfigError(
            f"storage={storage} is relative, and a submitted job runs in a temporary copy of the code; "
            "give --storage an absolute path that every node shares, or a URI"
        )
    return str(Path(storage).absolute())


def one_line(box: str) -> str:
    """The parser's message, which it draws as a box, as plain text on one line."""
    content = re.sub(r"\x1b\[[0-9;]*m", "", box).strip().partition("\n")[2]  # the first line is the box's title
    text = re.sub(r"\s+", " ", re.sub(r"[─│╭╮╰╯]+", " ", content)).strip()
    text = re.split(r" Argument helptext:| For full helptext", text)[0]
    text = re.sub(r"^.*?(?:Unrecognized options:|Error parsing (?:config\.\w+: )?)", "", text, count=1).strip()
    if "Unrecognized options" in box:
        unknown, _, suggestions = text.partition("Perhaps you meant:")
        similar = re.findall(r"--[\w.-]+", suggestions)
        hint = f"perhaps you meant {' or '.join(similar)}" if similar else "--help lists every setting"
        return f"unknown setting: {unknown.strip()}; {hint}"
    return text


class LineParser(argparse.ArgumentParser):
    """Plain options, for command lines that take no preset; errors in one line, as everywhere."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists every option")


def run_job(main: Callable[[list[str]], None]) -> NoReturn:
    """Run a command line's main and leave with its exit status.

    SIGTERM, which is how a job is stopped, is an interruption like Ctrl-C: everything open is ended as KILLED.
    """

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        provide_home()
        with quiet_without_reader():
            main(sys.argv[1:])
    except ConfigError as error:
        fail(error, USER_ERROR)
    except (ArtefactError, ClusterError, RunStopped) as error:
        fail(error, FAILURE)
    except KeyboardInterrupt:
        fail("interrupted; what is finished stays, and the same command continues", INTERRUPTED)
    sys.exit(0)


@contextlib.contextmanager
def quiet_without_reader() -> Iterator[None]:
    """Leave quietly where the standard output is a pipe whose reader has ended, as in `... | head`.

    A pipe that breaks elsewhere, in a library, is an error as any other.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # here, since at the end of the interpreter it would fail with a message
    except BrokenPipeError:
        if not _has_lost_its_reader(sys.stdout):
            raise
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # what is still buffered goes there
        sys.exit(NO_READER)


def _has_lost_its_reader(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream, 0)  # errors are reported without being asked for
    return any(event & select.POLLERR for _, event in poll.poll(0))


def fail(message: object, status: int) -> NoReturn:
    """One line on standard error, then the exit status."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)
