"""The command lines: what is wrong is said in one line, with the way out, before anything starts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.command import NO_READER, absolute_storage, parse, quiet_without_reader
from kraken.config import ConfigError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "a preset is missing; choose from: quickstart,"),
        (["nosuch"], "preset 'nosuch' does not exist; choose from: quickstart,"),
        (["--train.steps", "5"], "the preset comes first"),
        (["quickstart", "--train.stepz", "5"], "unknown setting: --train.stepz, 5; perhaps you meant --train.steps"),
        (["quickstart", "--zzzz"], "unknown setting: --zzzz; --help lists every setting"),
        (["quickstart", "--train.steps", "many"], "--train.steps: invalid literal for int() with base 10: 'many'"),
        (["quickstart", "--train.precision", "int8"], "invalid choice 'int8' for argument '--train.precision'"),
        (["quickstart", "--model.num-ways", "3"], "model.num_heads=8 is not divisible by model.num_ways=3"),
        (
            ["quickstart", "--data.tokenizer", "gpt2", "--model.vocab-size", "4160"],
            "model.vocab_size=4160 does not fit the 50257 ids of data.tokenizer=gpt2; choose model.vocab_size=50304",
        ),
    ],
)
def test_bad_input_is_one_line(argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KRAKEN_STORAGE", raising=False)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        parse("python -m jobs.end_to_end", "", argv)
    assert "\n" not in str(caught.value)


def test_overrides_and_storage_are_resolved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KRAKEN_STORAGE", raising=False)
    arguments = parse("x", "", ["quickstart", "--train.steps", "50", "--dry-run"])
    assert (arguments.config.train.steps, arguments.dry_run) == (50, True)
    assert arguments.config.storage == str(tmp_path / "storage")
    monkeypatch.setenv("KRAKEN_STORAGE", "/shared/kraken")
    assert parse("x", "", ["quickstart"]).config.storage == "/shared/kraken"
    assert parse("x", "", ["quickstart", "--storage", "s3://bucket/kraken"]).config.storage == "s3://bucket/kraken"


def test_a_submitted_job_needs_an_absolute_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match="storage=storage is relative, and a submitted job"):
        absolute_storage("storage")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )


def test_the_users_fault_exits_with_2_and_one_line() -> None:
    result = run("jobs.prepare", "quickstart", "--train.steps", "0")
    assert result.returncode == 2
    assert result.stderr == "error: train.steps=0 is not positive; choose a value above 0\n"


def test_a_storage_that_cannot_be_opened_exits_with_1_and_one_line() -> None:
    result = run("jobs.prepare", "quickstart", "--dry-run", "--storage", "nosuch://bucket")
    assert result.returncode == 1
    assert result.stderr.startswith("error: storage=nosuch://bucket cannot be opened")
    assert result.stderr.count("\n") == 1


def test_a_dry_run_shows_the_graph_and_changes_nothing(tmp_path: Path) -> None:
    result = run("jobs.end_to_end", "quickstart", "--dry-run", "--storage", str(tmp_path / "storage"))
    assert result.returncode == 0, result.stderr
    graph, _, table = result.stdout.partition("\n\n")
    lines, needs = graph.splitlines(), table.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["prepare", "pretrain", "convert", "evaluate", "deploy"]
    assert all(line.endswith("run") for line in lines[1:])
    assert "convert, evaluate" in lines[5]
    assert [line.split()[0] for line in needs] == ["needs", "prepare", "pretrain", "convert", "evaluate", "deploy"]
    assert (
        "2 workers x 1 CPU" in needs[2] and "4 checkpoints of 26.5 MB" in needs[2] and "multiplies matrices" in needs[2]
    )
    assert not (tmp_path / "storage").exists()


def test_only_a_reader_that_has_left_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as left, quiet_without_reader():
            print("nobody reads this")
        assert left.value.code == NO_READER
    with open(tmp_path / "output", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(BrokenPipeError, match="a socket of a library"), quiet_without_reader():
            raise BrokenPipeError("a socket of a library")
