"""The comparison: the report from synthetic histories, and two small models compared on a real cluster."""

import dataclasses
import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from jobs import compare as command_line
from kraken.checkpoint.history import History, write_history
from kraken.config import ConfigError, RunConfig
from kraken.manifest import ArtefactError, Manifest
from kraken.model import Kraken
from kraken.storage import Storage
from kraken.training.train import train
from pipelines import compare, end_to_end, pretrain
from pipelines.compare import CompareConfig
from pipelines.comparison import Training, label, markdown, tuning_table, verdicts, write
from pipelines.comparison import compare as build
from pipelines.stage import fingerprints
from pipelines.tracking import Tracker

ROOT = Path(__file__).parent.parent
TOKENS_PER_STEP = 64


def history(final_loss: float, seconds_per_step: float = 0.5, steps: int = 6) -> History:
    """Reports of every step, validations of every second one, which end in `final_loss`."""
    reports: History = []
    for step in range(1, steps + 1):
        report = {
            "step": float(step),
            "loss": 9.0,
            "tokens": float(step * TOKENS_PER_STEP),
            "seconds": step * seconds_per_step,
        }
        reports.append(report | ({"validation_loss": final_loss + (steps - step)} if step % 2 == 0 else {}))
    return reports


def training(model: str, seed: int, learning_rate: float, loss: float, **options: Any) -> Training:
    return Training(model, seed, learning_rate, 1000, history(loss, **options))


@pytest.fixture
def trainings() -> list[Training]:
    """Two models; the first learns best at 2e-3, the highest rate, and is slower."""
    return [
        training("kraken", 1, 1e-3, 4.5, seconds_per_step=1.0),
        training("standard", 1, 1e-3, 4.0),
        training("kraken", 1, 2e-3, 4.1, seconds_per_step=1.0),
        training("standard", 1, 2e-3, math.nan),
        training("kraken", 2, 2e-3, 4.3, seconds_per_step=3.0),
        training("standard", 2, 1e-3, 3.9),
    ]


class TestReport:
    def test_each_model_is_judged_at_its_best_rate(self, trainings: list[Training]) -> None:
        result = build(trainings, baseline="standard")
        kraken, standard = result.models
        assert (kraken.learning_rate, standard.learning_rate) == (2e-3, 1e-3)
        assert (kraken.losses, standard.losses) == ([4.1, 4.3], [4.0, 3.9])
        assert kraken.mean_loss == pytest.approx(4.2) and kraken.loss_deviation == pytest.approx(math.sqrt(0.02))
        assert result.excess(kraken) == pytest.approx(4.2 / 3.95 - 1)
        assert result.excess(standard) == 0.0
        assert kraken.tokens_per_second == pytest.approx(2 * 6 * 64 / (6 * 1.0 + 6 * 3.0))

    def test_a_curve_is_the_mean_over_the_seeds(self, trainings: list[Training]) -> None:
        curve = build(trainings).models[0].curve
        assert curve.tokens == [128, 256, 384]
        assert curve.seconds == [4.0, 8.0, 12.0]
        assert curve.mean == pytest.approx([8.2, 6.2, 4.2])
        assert curve.lowest == pytest.approx([8.1, 6.1, 4.1]) and curve.highest == pytest.approx([8.3, 6.3, 4.3])

    def test_the_text_says_how_the_models_differ_and_what_to_doubt(self, trainings: list[Training]) -> None:
        result = build(trainings, baseline="standard")
        first, edge, *rest = verdicts(result)
        assert first == (
            "kraken's mean validation loss is 4.2000, 6.33 % above standard's 3.9500 "
            "(standard deviation over seeds ±0.1414 and ±0.0707)."
        )
        assert edge.startswith("kraken's best learning rate, 0.002, is the highest that was tried")
        assert rest == [
            "standard's best learning rate, 0.001, is the lowest that was tried; a better one may lie beyond."
        ]
        text = markdown(result)
        assert re.search(r"\| kraken +\| 1,000 +\| 0.002 +\| 4.2000 ± 0.1414 \| \+6.33 % ", text)
        assert "| kraken | 4.5000 | **4.1000** |" in text and "| standard | **4.0000** | nan |" in text

    def test_the_json_and_the_figure(self, trainings: list[Training], tmp_path: Path) -> None:
        result = build(trainings, baseline="standard")
        paths = write(result, tmp_path / "report")
        assert [path.name for path in paths] == ["compare.json", "compare.md", "compare.png", "compare.svg"]
        values = json.loads(paths[0].read_text())
        assert (values["baseline"], values["train_tokens"], set(values["models"])) == (
            *("standard", 384),
            {"kraken", "standard"},
        )
        kraken = values["models"]["kraken"]
        assert kraken["final_validation_losses"] == [4.1, 4.3] and kraken["seeds"] == [1, 2]
        assert kraken["mean_final_validation_loss"] == statistics.fmean([4.1, 4.3])
        assert kraken["std_final_validation_loss"] == statistics.stdev([4.1, 4.3])
        assert kraken["parameters"] == 1000 and kraken["tokens_per_second"] == pytest.approx(32.0)
        assert kraken["tuning"][0] == {"learning_rate": 1e-3, "seed": 1, "final_validation_loss": 4.5}
        assert values["models"]["standard"]["tuning"][1]["final_validation_loss"] is None  # JSON has no nan
        assert kraken["curve"]["tokens"] == [128, 256, 384]
        header = paths[2].read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(header[16:20], "big") > 1000
        assert paths[3].read_text().startswith("<?xml")

    def test_one_seed_and_one_rate_is_enough(self, tmp_path: Path) -> None:
        result = build([training("a", 1, 1e-3, 4.0, steps=2), training("b", 1, 5e-4, 4.0, steps=2)])
        assert result.baseline.name == "a" and result.models[1].loss_deviation is None
        assert verdicts(result) == [
            "b's mean validation loss is 4.0000, 0.00 % below a's 4.0000 (one seed, so the spread is unknown)."
        ]
        assert tuning_table(result) == ""
        write(result, tmp_path)

    def test_what_cannot_be_compared_is_refused(self) -> None:
        whole = training("a", 1, 1e-3, 4.0)
        with pytest.raises(ArtefactError, match="b-seed1-lr0.001 ends after 256 tokens and a-seed1-lr0.001 after 384"):
            build([whole, training("b", 1, 1e-3, 4.0, steps=4)])
        with pytest.raises(ArtefactError, match="does not end in a validation"):
            build([whole, training("b", 1, 1e-3, 4.0, steps=5)])
        with pytest.raises(ConfigError, match="baseline=c is none of the compared models; choose from: a"):
            build([whole], baseline="c")

    def test_the_report_needs_no_ray_and_no_mlflow(self) -> None:
        code = (
            "import sys; sys.modules |= dict.fromkeys(('ray', 'mlflow', 'torch', 'tyro'))\n"
            "import pipelines.comparison, matplotlib.figure"
        )
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


class TestCommandLine:
    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["nosuch"], "preset 'nosuch' does not exist; choose from: quickstart,"),
            (["standard_10m"], "only standard_10m is given; a comparison needs two models"),
            (["standard_10m", "standard_10m"], "two models are named standard_10m"),
            (["--name", "x"], "two models are named x; give each preset once, and no --name"),
            (["--seeds", "0"], "seeds=0 is not positive"),
            (["--learning-rates", "1e-3", "-1"], "train.learning_rate=-1.0 is not positive"),
            (["--learning-rates", "1e-3", "--train.learning-rate", "2e-3"], "exclude each other"),
            (["--baseline", "gpt2_124m"], "baseline=gpt2_124m is none of the compared models; choose from: kraken_10m"),
            (["--train.stepz", "5"], "kraken_10m_2way: unknown setting: --train.stepz, 5; perhaps you meant"),
            (["--model.num-heads", "9"], "kraken_10m_2way: model.num_heads=9 is not divisible by model.num_ways=2"),
            (["quickstart", "standard_10m"], "models are compared at equal train.steps x train.sequences_per_step"),
            (["gpt2_124m", "standard_10m"], "gpt2_124m has data.tokenizer=gpt2, standard_10m has trained"),
        ],
    )
    def test_bad_input_is_one_line(self, argv: list[str], message: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(message)) as caught:
            command_line.parse(argv)
        assert "\n" not in str(caught.value)

    def test_models_of_different_budgets_are_refused(self) -> None:
        names = ["kraken_10m_2way", "standard_10m", "--model.num-layers", "3"]
        config, _ = command_line.parse([*names, "--model.ffn-multiple", "4"])
        with pytest.raises(ConfigError, match=r"kraken_10m_2way has [\d,]+ parameters, [\d.]+ % more than the"):
            compare.require_equal_parameters(config)
        config, _ = command_line.parse([*names, "--model.ffn-multiple", "4", "--allow-unequal"])
        compare.require_equal_parameters(config)

    def test_settings_apply_to_all_models(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("KRAKEN_STORAGE", raising=False)
        argv = ["--seeds", "2", "--learning-rates", "1e-3", "2e-3", "--train.steps", "80", "--storage", "/shared"]
        config, is_dry_run = command_line.parse([*argv, "--dry-run"])
        assert is_dry_run and [model.name for model in config.models] == list(command_line.MODELS)
        assert {(model.train.steps, model.storage) for model in config.models} == {(80, "/shared")}
        assert config.baseline_name == "standard_10m"
        assert config.num_trainings == 5 * (2 + 1)
        compare.require_equal_parameters(config)

    def test_it_answers_without_loading_torch(self) -> None:
        code = "import sys, jobs.compare; print(sorted({'torch', 'mlflow', 'matplotlib'} & set(sys.modules)))"
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert result.stdout.strip() == "[]"

    def test_a_dry_run_lists_the_trainings(self, tmp_path: Path) -> None:
        config, _ = command_line.parse(["--storage", str(tmp_path / "storage"), "--seeds", "2"])
        lines = compare.describe(config).splitlines()
        assert len(lines) == 1 + 10 and all(line.endswith("run") for line in lines[1:])
        tuned = dataclasses.replace(config, learning_rates=(1e-3, 2e-3))
        assert compare.describe(tuned).endswith("then each model's other seeds at its best rate: 5 trainings")
        assert not (tmp_path / "storage").exists()


# On a cluster


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> CompareConfig:
    """A Kraken and a standard model of 14,480 and 14,202 parameters, four steps each."""
    run = tiny.config(precision="float32", steps=4, validate_every=2, log_every=4, checkpoint_every=4)
    corpus = tmp_path_factory.mktemp("corpus")
    tiny.corpus(corpus)
    data = dataclasses.replace(run.data, corpus="files", paths=(f"{corpus}/*.py",))
    kraken = dataclasses.replace(run, name="kraken", storage=str(tmp_path_factory.mktemp("storage")), data=data)
    shape = {"architecture": "standard", "num_ways": 1, "num_heads": 2, "width": 18, "ffn_multiple": 4}
    standard = dataclasses.replace(kraken, name="standard", model=dataclasses.replace(kraken.model, **shape))
    return CompareConfig(models=(kraken, standard), num_seeds=2, learning_rates=(1e-2, 1e-4))


def train_in_this_process(config: CompareConfig, runs: list[RunConfig]) -> None:
    """Finish some trainings without Ray Train, which takes seconds to start each."""
    end_to_end.run(config.models[0], until="prepare")
    stage = dataclasses.replace(
        pretrain.STAGE, work=lambda work: (train(work.config, work.parent_folder("prepare"), work.folder), {})
    )
    fingerprint_of = compare.training_fingerprints(config)
    storage = Storage(config.models[0].storage)
    data = storage.find("prepare", fingerprints(end_to_end.STAGES, config.models[0])["prepare"])
    assert data is not None
    with Tracker(storage.uri).pipeline("in process", "in process") as pipeline:
        for run in runs:
            stage.run(run, fingerprint_of(run), {"prepare": data}, pipeline.ref)


def progress_lines(capfd: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capfd.readouterr().out.splitlines() if re.match(r"compare: \d", line)]


@pytest.mark.slow
@pytest.mark.ray
def test_an_interrupted_comparison_continues(
    ray_cluster: str, config: CompareConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Five of six trainings are there, and one is left for the cluster; then all are."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    runs = [run for _, run in config.first_runs()]
    runs += [run for _, run in config.other_runs({"kraken": 1e-2, "standard": 1e-2})]
    train_in_this_process(config, runs[:-1])
    assert compare.describe(config).count("reused") == 4

    result = compare.run(config)
    lines = progress_lines(capfd)
    assert ["reused" in line for line in lines] == [True] * 5 + [False]
    assert lines[0].startswith("compare: 1 of 6 | kraken-seed1337-lr0.01: validation loss ")
    assert lines[-1].endswith("about 0 s left")
    assert result.comparison.baseline.name == "standard"
    check_report(config, result)
    check_mlflow(config, result)

    again = compare.run(config)
    assert ["reused" in line for line in progress_lines(capfd)] == [True] * 6
    assert again == result
    assert "MLflow http://127.0.0.1:5000/#/experiments/" in compare.render(again)


def check_report(config: CompareConfig, result: compare.CompareResult) -> None:
    """compare.json against the manifests of the trainings: the same numbers by another path."""
    storage = Storage(config.models[0].storage)
    values = json.loads((result.folder / "compare.json").read_text())
    report = Manifest.read(result.folder)
    assert len(report.parents) == 6
    for model in config.models:
        facts = values["models"][model.name]
        with torch.device("meta"):
            assert facts["parameters"] == sum(parameter.numel() for parameter in Kraken(model.model).parameters())
        assert facts["curve"]["tokens"] == [2 * 4 * 32, 4 * 4 * 32]
        assert len(facts["seeds"]) == len(facts["tuning"]) == 2
        for seed, loss in zip(facts["seeds"], facts["final_validation_losses"], strict=True):
            manifest = storage.find("pretrain", report.parents[label(model.name, seed, facts["learning_rate"])])
            assert manifest is not None and manifest.value("final_validation_loss") == loss


def check_mlflow(config: CompareConfig, result: compare.CompareResult) -> None:
    """One run for the comparison, one below it per model, tags both ways, curves over tokens."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{config.models[0].storage}/mlflow.db")
    experiment_id = client.get_experiment_by_name("kraken").experiment_id
    runs = client.search_runs([experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    [run] = [run for run in runs if run.info.run_name == "comparison"]
    assert f"/runs/{run.info.run_id}?" in result.page
    assert json.loads(run.data.params["models"]) == ["kraken", "standard"]
    kraken = result.comparison.models[0]
    assert run.data.metrics["final_validation_loss.kraken"] == kraken.mean_loss
    artefacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert artefacts >= {"compare.json", "compare.md", "compare.png", "compare.svg", "manifest.json"}
    assert "kraken's mean validation loss is" in run.data.tags["mlflow.note.content"]
    children = {r.info.run_name: r for r in runs if r.data.tags.get("mlflow.parentRunId") == run.info.run_id}
    assert set(children) == {"kraken", "standard"}
    points = client.get_metric_history(children["kraken"].info.run_id, "validation_loss")
    assert [(point.step, point.value) for point in points] == list(
        zip(kraken.curve.tokens, kraken.curve.mean, strict=True)
    )
    linked = {name: value for name, value in run.data.tags.items() if name.startswith("kraken.compared.")}
    assert len(linked) == 6
    for name, run_id in linked.items():
        pipeline = client.get_run(run_id)
        assert pipeline.info.run_name == name.removeprefix("kraken.compared.")
        assert pipeline.data.tags["kraken.comparison"] == run.info.run_id


def test_a_history_on_disk_is_all_a_training_needs(tmp_path: Path) -> None:
    from kraken.checkpoint.history import read_history

    write_history(tmp_path, history(4.0))
    assert Training("a", 1, 1e-3, 1000, read_history(tmp_path)) == training("a", 1, 1e-3, 4.0)


def test_an_error_of_training_names_it(config: CompareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: RunConfig, until: str) -> Callable[[], None]:
        raise ArtefactError("loss is nan")

    monkeypatch.setattr(compare.end_to_end, "run", fail)
    with pytest.raises(ArtefactError, match="kraken-seed1337-lr0.01: loss is nan"):
        compare.train_all(config, lambda run: "f" * 64)
