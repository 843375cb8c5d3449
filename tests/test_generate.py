"""The command line that completes a prompt: its text is the engine's, and its errors are one line."""

import asyncio
import io
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny

from jobs.command import INTERRUPTED, NO_READER
from jobs.generate import main
from kraken.config import ConfigError, EngineConfig
from kraken.convert import write_exchange
from kraken.manifest import ArtefactError, finish_artefact
from kraken.tokenizer import END_OF_TEXT
from kraken.training.train import train
from serve.app import ServeArgs, load_model
from serve.completions import CompletionCall
from serve.protocol import CompletionRequest

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


def test_a_prompt_means_what_it_means_over_http(exchange: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The end of text in a prompt ends a document; nothing at all is the beginning of one."""
    arguments = [str(exchange), "--max-tokens", "12", "--temperature", "1", "--seed", "5", *OPTIONS]
    texts = []
    for prompt in (END_OF_TEXT, "", END_OF_TEXT + " "):
        main([*arguments, "--prompt", prompt])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    fields = {"max_tokens": 12, "temperature": 1, "seed": 5, "ignore_eos": True, "skip_special_tokens": False}
    body = CompletionRequest(model="kraken", prompt=END_OF_TEXT, **fields)
    args = ServeArgs(
        exchange=exchange, engine="torch", engine_config=EngineConfig(kind="torch", device="cpu", num_threads=1)
    )

    async def complete() -> str:
        model = load_model(args)
        try:
            call = await CompletionCall.prepare(body, model)
            return (await call.collect(call.parts())).choices[0].text
        finally:
            await model.engine.close()

    assert texts[0].rstrip("\n") == asyncio.run(complete()).rstrip("\n")


@pytest.mark.parametrize("extreme", ["--top-p=0", "--top-p=1e-46", "--top-k=1", "--temperature=1e-40"])
def test_extreme_options_mean_greedy(exchange: Path, capsys: pytest.CaptureFixture[str], extreme: str) -> None:
    arguments = [str(exchange), "--prompt", "def value", "--max-tokens", "12", *OPTIONS]
    main([*arguments, "--temperature", "0"])
    greedy = capsys.readouterr().out
    main([*arguments, extreme])
    assert capsys.readouterr().out == greedy


def test_a_reader_that_leaves_ends_it_quietly(exchange: Path) -> None:
    command = [sys.executable, "-m", "jobs.generate", str(exchange), "--prompt", "def", "--max-tokens", "28", *OPTIONS]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert (process.returncode, errors) == (NO_READER, "")


def test_an_interruption_ends_a_session_that_waits_for_a_line(exchange: Path) -> None:
    command = [sys.executable, "-m", "jobs.generate", str(exchange), "--interactive", *OPTIONS[:-1]]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stderr
        assert b"one prompt a line" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=60)  # its standard input stays open, as a terminal's does
        finally:
            process.kill()
        assert (process.returncode, process.stderr.read().strip()) == (INTERRUPTED, b"")


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
        (["--prompt", "a", "--max-tokens", "0"], "max_tokens=0 generates nothing"),
        (["--prompt", "a", "--temperature", "nan"], "temperature=nan is outside 0..100"),
        (["--prompt", "a", "--repetition-penalty", "1e-38"], "repetition_penalty=1e-38 is outside 0.01..100"),
        (["--prompt", "a", "--stop", ""], "stop holds an empty string"),
        (["--prompt", "a", *[f"--stop={index}" for index in range(33)]], "stop holds 33 strings"),
        (["--prompt", "a\udcff"], "prompt is not valid Unicode at character 1"),
        (["--prompt", "a" * 10_000], "exceed the context of 32"),
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
