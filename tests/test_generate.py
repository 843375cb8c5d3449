"""The command line that completes a prompt: its text is the engine's, and its errors are one line."""

import io
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from jobs.generate import main
from kraken.config import ConfigError
from kraken.convert import write_exchange
from kraken.manifest import ArtefactError, finish_artefact
from kraken.training.train import train

ROOT = Path(__file__).parent.parent
OPTIONS = ("--device", "cpu", "--num-threads", "1", "--ignore-eos")


@pytest.fixture(scope="module")
def exchange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generate")
    tiny.prepared(root / "data")
    train(tiny.config(steps=4, precision="float32"), root / "data", root / "run")
    (root / "exchange").mkdir()
    started_at = time.monotonic()
    metrics, details = write_exchange(root / "run" / "step_000000004", root / "data", root / "exchange")
    finish_artefact(
        root / "exchange",
        started_at=started_at,
        kind="convert",
        fingerprint="tiny",
        config={},
        parents={},
        metrics=metrics,
        details=details,
    )
    return root / "exchange"


def test_a_seed_repeats_the_text_and_the_last_line_counts(exchange: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for _ in range(2):
        main([str(exchange), "--prompt", "def value", "--max-tokens", "12", "--seed", "3", *OPTIONS])
        captured = capsys.readouterr()
        texts.append(captured.out)
        assert re.search(r"^\[12 tokens, TTFT [\d.]+ ms, then [\d.]+ tokens/s\]$", captured.err, re.MULTILINE)
    assert texts[0] == texts[1] and texts[0].strip()


def test_a_stop_string_ends_the_text(exchange: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(exchange), "--prompt", "def value", "--max-tokens", "16", "--temperature", "0", *OPTIONS]
    main(arguments)
    free = capsys.readouterr().out.rstrip("\n")
    stop = free[2:4]
    main([*arguments, "--stop", stop])
    assert capsys.readouterr().out.rstrip("\n") == free[: free.index(stop)]


@pytest.mark.slow
def test_two_devices_write_the_same_text(exchange: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(exchange), "--prompt", "def value", "--max-tokens", "16", "--temperature", "0", *OPTIONS]
    main(arguments)
    alone = capsys.readouterr().out
    main([*arguments, "--num-devices", "2"])
    assert capsys.readouterr().out == alone


def test_a_session_continues_its_text_and_survives_one_that_is_too_long(
    exchange: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["def", "value", "index " * 40, "", "for"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    main([str(exchange), "--interactive", "--max-tokens", "4", "--temperature", "0", *OPTIONS])
    captured = capsys.readouterr()
    assert captured.err.count("[4 tokens, TTFT") == 3
    assert "leaves no room in the context of 32" in captured.err or "exceed the context of 32" in captured.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --prompt TEXT or --interactive"),
        (["--prompt", "a", "--interactive"], "give either --prompt TEXT or --interactive"),
        (["--prompt", "a", "--temperature", "-1"], "temperature=-1.0 is outside 0..100"),
        (["--prompt", "a", "--max-tokens", "64"], "exceed the context of 32"),
        (["--prompt", "index " * 40], "leaves no room in the context of 32"),
        (["--prompt", "a", "--top-q", "1"], "unrecognized arguments: --top-q 1; --help lists every option"),
        (["--prompt", "a", "--num-threads", "-1"], "engine.num_threads=-1 is negative"),
    ],
)
def test_bad_options_are_one_line(exchange: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        main([str(exchange), *options])
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="manifest"):
        main([str(tmp_path), "--prompt", "a"])


def test_help_answers_without_torch() -> None:
    code = (
        "import contextlib, io, sys, jobs.generate\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "    jobs.generate.main(['--help'])\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
