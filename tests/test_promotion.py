"""What is in production: a worse model is refused, a forced one recorded, and a rollback brings the former one back."""

import dataclasses
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from jobs import registry as command_line
from jobs import stage as stage_command
from kraken.config import ConfigError, RunConfig
from kraken.manifest import ArtefactError
from kraken.storage import Storage
from pipelines import champion, clean, deploy, end_to_end
from pipelines.registry import Registry, Version

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def run_config(storage: Path, port: int, **train: Any) -> RunConfig:
    config = dataclasses.replace(tiny.config(**({"precision": "float32"} | train)), storage=str(storage))
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, validation_fraction=0.01),
        serve=dataclasses.replace(config.serve, port=port),
        evaluate=dataclasses.replace(config.evaluate, max_windows=4, parity_windows=2, parity_tokens=4),
    )


@pytest.fixture(scope="module")
def good(
    ray_cluster: str, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[RunConfig]:
    """A deployed model, version 1."""
    from ray import serve as ray_serve

    config = run_config(tmp_path_factory.mktemp("storage"), free_port(), steps=40)
    end_to_end.run(config)
    yield config
    ray_serve.shutdown()


@pytest.fixture(scope="module")
def bad(good: RunConfig) -> RunConfig:
    """A model that has hardly learnt anything."""
    return dataclasses.replace(good, train=dataclasses.replace(good.train, steps=2, learning_rate=1e-6, warmup_steps=0))


def served(config: RunConfig) -> str:
    return deploy.health(config.serve)["exchange_fingerprint"]  # type: ignore[index]


def champion_of(config: RunConfig) -> Version:
    found = Registry(config.storage).champion("kraken")
    assert found is not None
    return found


def test_a_worse_model_is_refused_forced_and_rolled_back(
    good: RunConfig, bad: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    first = champion_of(good)
    assert first.number == 1 and served(good) == first.lineage.exchange
    with pytest.raises(
        ArtefactError, match=r"perplexity is .* above the .* of the champion models:/kraken/1"
    ) as refused:
        end_to_end.run(bad)
    assert "stays in production; --force perplexity='REASON'" in str(refused.value)
    registry = Registry(good.storage)
    assert len(registry.versions("kraken")) == 1 and served(good) == first.lineage.exchange

    end_to_end.run(dataclasses.replace(bad, gates=dataclasses.replace(bad.gates, force=("perplexity=a drill",))))
    second = champion_of(good)
    assert (second.number, second.tags["kraken.gates"]) == (2, "forced perplexity")
    assert "a drill" in second.tags["kraken.forced"] and served(good) == second.lineage.exchange
    increase = float(second.lineage.perplexity) / float(first.lineage.perplexity) - 1
    assert f"{increase:.2%} above" in str(refused.value)

    with pytest.raises(ConfigError, match="--reason is empty"):
        command_line.main(["rollback", "--storage", good.storage, "--reason", " "])
    command_line.main(["rollback", "--storage", good.storage, "--reason", "the drill is over"])
    assert champion_of(good).number == 1 and served(good) == first.lineage.exchange
    events = [(e.action, e.version, e.previous, e.why) for e in registry.history("kraken")]
    assert events == [
        ("promotion", 1, None, "gates: passed"),
        ("promotion", 2, 1, "gates: forced perplexity"),
        ("rollback", 1, 2, "the drill is over"),
    ]
    capsys.readouterr()
    command_line.main(["list", "--storage", good.storage])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["version", "2", "1"] and "champion" in lines[2]
    command_line.main(["history", "--storage", good.storage])
    assert "the drill is over" in capsys.readouterr().out.splitlines()[3]


def test_a_version_is_evaluated_again_without_training(
    good: RunConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.evaluate import STAGE

    trainings = [*Path(good.storage).glob("pretrain/*")]
    argv = ["models:/kraken/1", "--storage", good.storage, "--evaluate.max-windows", "2"]
    stage_command.run_until(STAGE, "", argv)
    assert "scored_tokens                                  64 tokens" in capsys.readouterr().out
    assert [*Path(good.storage).glob("pretrain/*")] == trainings
    with pytest.raises(ConfigError, match="train differs from that of models:/kraken/1"):
        stage_command.run_until(STAGE, "", [*argv, "--train.steps", "9"])


def test_latency_of_a_model_against_itself_is_near_one(good: RunConfig) -> None:
    lineage = Registry(good.storage).resolve("models:/kraken/1").lineage
    question = champion.Question(
        exchange=lineage.location,
        champion_exchange=lineage.location,
        champion_data=f"{good.storage}/prepare/{lineage.prepare[:16]}",
        scored_tokens=int(lineage.scored_tokens),
        engine=good.engine,
        wants_perplexity=False,
        wants_latency=True,
    )
    found = champion.measure(question)
    assert found["latency_ms"] > 0 and 0.2 < found["latency_ms"] / found["champion_latency_ms"] < 5


def test_mlflow_serves_a_version_without_ray(good: RunConfig, tmp_path: Path, free_port: Callable[[], int]) -> None:
    from survival import wait_until

    from jobs import local
    from pipelines import local_head

    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    environment |= {"MLFLOW_TRACKING_URI": f"sqlite:///{good.storage}/mlflow.db", "MLFLOW_DISABLE_TELEMETRY": "true"}
    code = (
        "import json, sys, mlflow\n"
        "model = mlflow.pyfunc.load_model('models:/kraken@champion')\n"
        "answers = model.predict(['import os'], params={'max_tokens': 4, 'temperature': 0.0})\n"
        "import kraken\n"
        "print(json.dumps([answers, 'ray' in sys.modules, kraken.__file__]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,  # not the checkout: the code comes with the model
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    answers, has_ray, origin = json.loads(result.stdout.strip().splitlines()[-1])
    assert isinstance(answers[0], str) and not has_ray and "/code/kraken/" in origin

    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/kraken@champion"]
    server = subprocess.Popen(
        [*command, "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)], cwd=tmp_path, env=environment
    )
    try:
        wait_until(lambda: local.answers(f"http://127.0.0.1:{port}/health"))
        body = json.dumps({"inputs": ["import os"], "params": {"max_tokens": 4, "temperature": 0.0}}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            assert json.load(response) == {"predictions": answers}
    finally:
        local_head.end_tree(server.pid)
        server.wait(30)


def test_a_run_that_is_deleted_gives_its_artefacts_free_but_not_the_champions(good: RunConfig, bad: RunConfig) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{good.storage}/mlflow.db")
    for run in client.search_runs([client.get_experiment_by_name("kraken").experiment_id]):
        client.delete_run(run.info.run_id)
    registry, storage = Registry(good.storage), Storage(good.storage)
    first, second = (registry.resolve(f"models:/kraken/{number}") for number in (1, 2))
    client.delete_registered_model_alias("kraken", "candidate")
    survey = clean.survey(storage, clean.references(good.storage, registry))
    gone = {item.name for item in survey.items if item.what == "unreferenced"}
    assert f"convert/{second.lineage.exchange[:16]}" in gone and f"pretrain/{second.lineage.pretrain[:16]}" in gone
    kept = {f"{kind}/{getattr(first.lineage, kind)[:16]}" for kind in ("prepare", "pretrain", "evaluate")}
    assert kept | {f"convert/{first.lineage.exchange[:16]}"} <= survey.kept
    clean.remove(storage, survey.items, lambda item: None)
    assert first.folder().is_dir() and served(good) == first.lineage.exchange
    with pytest.raises(ArtefactError, match="models:/kraken/2 is registered, but its model was removed from"):
        second.folder()
    assert "removed from" in command_line.state(second)
