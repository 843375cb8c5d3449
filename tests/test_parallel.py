"""Every mesh of processes trains the model that one process trains: losses, gradients, weights; float64 over gloo."""

import dataclasses
import gc
import json
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from kraken.checkpoint.history import read_history
from kraken.checkpoint.reader import KINDS
from kraken.config import ConfigError, ModelConfig, RunConfig
from kraken.model.ways import WayGroup
from kraken.training.parallel import join_mesh
from kraken.training.step import TrainingStep
from kraken.training.train import NoHooks, train

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-9
STEPS = 10


def run_config(num_workers: int = 1, shard: int = 1, way: int = 1, model: dict[str, Any] | None = None) -> RunConfig:
    """Four ways, clipping that bites, micro-batches; of `num_workers` processes."""
    run = tiny.config(
        steps=STEPS, sequences_per_microbatch=1, checkpoint_every=1, keep_checkpoints=STEPS, log_every=1, clip_norm=0.2
    )
    shape = {"num_layers": 3, "num_heads": 4, "num_ways": 4} | (model or {})
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, **shape),
        cluster=dataclasses.replace(run.cluster, num_workers=num_workers, shard_size=shard, way_size=way),
    )


class StopAt(NoHooks):
    """Ends training right after a checkpoint."""

    def __init__(self, step: int | None):
        self.step = step

    def on_checkpoint(self, step: int, path: Path) -> None:
        if step == self.step:
            raise KeyboardInterrupt


def train_as_rank(rank: int, port: int, run: RunConfig, data: Path, folder: Path, stop_at: int | None) -> None:
    environment = {"RANK": rank, "WORLD_SIZE": run.cluster.num_workers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    try:
        train(run, data, folder, StopAt(stop_at))
    except KeyboardInterrupt:
        os._exit(0)


def train_on(run: RunConfig, data: Path, folder: Path, stop_at: int | None = None) -> None:
    """Train on as many processes as the config says."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=train_as_rank, args=(rank, port, run, data, folder, stop_at))
        for rank in range(run.cluster.num_workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * run.cluster.num_workers


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel") / "alone"
    train(run_config(), data, folder)
    return folder


def assert_equal_runs(left: Path, right: Path, steps: tuple[int, ...] = (1, STEPS)) -> None:
    """Losses of every step; after each of `steps` the weights and moments. After step 1 those are the gradients."""
    for a, b in zip(read_history(left), read_history(right), strict=True):
        for name in ("step", "loss", "grad_norm", "validation_loss"):
            assert a.get(name) == pytest.approx(b.get(name), abs=TOLERANCE), (a["step"], name)
    for step in steps:
        for kind in KINDS:
            a, b = (tiny.whole(folder / f"step_{step:09d}", kind) for folder in (left, right))
            assert a.keys() == b.keys()
            for name in a:
                torch.testing.assert_close(
                    a[name],
                    b[name],
                    rtol=0,
                    atol=TOLERANCE,
                    equal_nan=True,  # of the running mean of the loss while nothing asks for it
                    msg=lambda m, n=name, s=step: f"step {s}, {n}: {m}",
                )


MESHES = {
    "way2": {"num_workers": 2, "way": 2},
    "shard2": {"num_workers": 2, "shard": 2},
    "way4": {"num_workers": 4, "way": 4},
    "way2_shard2": {"num_workers": 4, "way": 2, "shard": 2},
    "replicate2_way2": {"num_workers": 4, "way": 2},
    "replicate2_shard2": {"num_workers": 4, "shard": 2},
}


QUICK = ("way2",)


@pytest.mark.parametrize(
    "mesh", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MESHES]
)
def test_every_mesh_trains_what_one_process_trains(mesh: str, data: Path, alone: Path, tmp_path: Path) -> None:
    train_on(run_config(**MESHES[mesh]), data, tmp_path)
    assert_equal_runs(alone, tmp_path)
    assert all(report["seconds_in_communication"] > 0 for report in read_history(tmp_path))


@pytest.mark.slow
def test_modern_options_and_biases_on_the_way_axis(data: Path, tmp_path: Path) -> None:
    model = {"positions": "rope", "activation": "swiglu", "bias": True}
    train(run_config(model=model), data, tmp_path / "alone")
    train_on(run_config(2, way=2, model=model), data, tmp_path / "two")
    assert_equal_runs(tmp_path / "alone", tmp_path / "two")


DELAYED = {"architecture": "kraken_delayed", "num_layers": 4}


@pytest.mark.slow
def test_delayed_ways_on_every_mesh_with_and_without_recomputing(data: Path, tmp_path: Path) -> None:
    train(run_config(model=DELAYED), data, tmp_path / "alone")
    for name, mesh in MESHES.items():
        run = run_config(**mesh, model=DELAYED)
        recomputes = name in ("way2", "way2_shard2")
        run = dataclasses.replace(run, train=dataclasses.replace(run.train, recompute_activations=recomputes))
        train_on(run, data, tmp_path / name)
        assert_equal_runs(tmp_path / "alone", tmp_path / name)


@pytest.mark.slow
def test_recomputed_activations_change_nothing(data: Path, alone: Path, tmp_path: Path) -> None:
    run = run_config(2, way=2)
    recomputing = dataclasses.replace(run, train=dataclasses.replace(run.train, recompute_activations=True))
    train_on(recomputing, data, tmp_path)
    assert_equal_runs(alone, tmp_path)


def spans(trace: Path, name: str) -> list[tuple[float, float]]:
    """(start, end) of every span of that name, in order of time."""
    events = json.loads(trace.read_text())["traceEvents"]
    return sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("ph") == "X" and e["name"] == name)


@pytest.mark.slow
def test_a_trace_shows_a_whole_delayed_layer_while_its_sum_is_in_flight(data: Path, tmp_path: Path) -> None:
    run = run_config(2, way=2, model=DELAYED)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, trace_step=2, steps=2, warmup_steps=1))
    train_on(run, data, tmp_path)
    for rank in range(2):
        trace = tmp_path / f"trace_rank_{rank}.json"
        for begins, gelu, ends in (
            ("_StartSum", "aten::gelu", "_WaitSum"),
            ("_WaitSumBackward", "aten::gelu_backward", "_StartSumBackward"),
        ):
            begun, ended = spans(trace, begins), spans(trace, ends)
            assert len(begun) == len(ended) == 4 * 2 // 2 * 2  # micro-batches, times the layers that start a sum
            kernels = ("aten::_scaled_dot_product_flash_attention_for_cpu", gelu)
            if gelu.endswith("backward"):
                kernels = (f"{kernels[0]}_backward", gelu)
            for kernel in kernels:
                computed = spans(trace, kernel)
                for (_, begin), (end, _) in zip(begun, ended, strict=True):
                    assert any(begin < start and stop < end for start, stop in computed), kernel


@pytest.mark.parametrize("overlap", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_trace_shows_attention_while_the_sum_is_in_flight(overlap: bool, data: Path, tmp_path: Path) -> None:
    run = run_config(2, way=2)
    run = dataclasses.replace(
        run,
        train=dataclasses.replace(run.train, trace_step=2, steps=2, warmup_steps=1),
        cluster=dataclasses.replace(run.cluster, overlap=overlap),
    )
    train_on(run, data, tmp_path)
    for rank in range(2):
        trace = tmp_path / f"trace_rank_{rank}.json"
        for begins, attention, ends in (
            ("_StartSum", "aten::_scaled_dot_product_flash_attention_for_cpu", "_WaitSum"),
            ("_WaitSumBackward", "aten::_scaled_dot_product_flash_attention_for_cpu_backward", "_StartSumBackward"),
        ):
            begun, ended, attended = spans(trace, begins), spans(trace, ends), spans(trace, attention)
            assert len(begun) == len(ended) == 4 * 2 // 2 * 2  # micro-batches, times the layers that read a sum
            for (_, begin), (end, _) in zip(begun, ended, strict=True):
                assert any(begin < start and stop < end for start, stop in attended)
        if not overlap:  # then nothing is in flight any more when the launch returns
            launched = [span for name in ("_StartSum", "_WaitSumBackward") for span in spans(trace, name)]
            reduced = spans(trace, "gloo:all_reduce")
            for begin, end in launched:
                assert any(begin < start and stop < end for start, stop in reduced)


@pytest.mark.slow
def test_a_checkpoint_of_any_mesh_continues_on_any_other(data: Path, alone: Path, tmp_path: Path) -> None:
    train_on(run_config(2, way=2), data, tmp_path, stop_at=3)
    assert [report["step"] for report in read_history(tmp_path / "step_000000003")] == [1, 2, 3]
    train_on(run_config(1), data, tmp_path, stop_at=5)
    train_on(run_config(4, way=2, shard=2), data, tmp_path)
    assert_equal_runs(alone, tmp_path, steps=(3, 5, STEPS))


def steps_as_rank(rank: int, port: int, compiles: str, results: Any) -> None:
    """Five steps on two processes that share a model; rank 0 tells the losses, graph breaks and living tensors."""
    environment = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    run = run_config(2, way=2)
    config = dataclasses.replace(run.train, compile=compiles, precision="float32", sequences_per_step=2)
    tokens = torch.Generator().manual_seed(0)
    shape = (2, run.model.context_length + 1)
    if compiles == "off":
        gc.disable()
    with join_mesh(False, way_size=2) as mesh:
        step = TrainingStep(run.model, config, mesh)
        step.start(STEPS)
        losses, living = [], []
        for index in range(5):
            ids = torch.randint(run.model.vocab_size, shape, generator=tokens)
            losses.append(float(step(index, ids[:, :-1].contiguous(), ids[:, 1:].contiguous())[0]))
            step.bad_steps()
            living.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
        if mesh.is_main:
            results.put((losses, living, sum(torch._dynamo.utils.counters["graph_break"].values())))


def run_steps(compiles: str) -> tuple[list[float], list[int], int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=steps_as_rank, args=(rank, port, compiles, results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = results.get(timeout=600)
    for process in processes:
        process.join()
    return found


def test_a_step_leaves_no_tensor_behind_that_only_the_collector_would_free() -> None:
    _, living, _ = run_steps("off")
    assert living[1] == living[-1], living  # the first step makes the optimizer's moments


@pytest.mark.slow
def test_a_compiled_layer_is_one_graph_with_its_sum_inside() -> None:
    eager, compiled = run_steps("off"), run_steps("on")
    assert compiled[0] == pytest.approx(eager[0], rel=1e-5)
    assert compiled[2] == 0


class TestBadInput:
    def test_the_axes_must_make_up_the_workers(self) -> None:
        with pytest.raises(ConfigError, match="num_workers=4 is not a multiple of cluster.shard_size=3.*choose 3"):
            run_config(4, shard=3)

    def test_ways_must_divide(self) -> None:
        with pytest.raises(ConfigError, match=r"way_size=3 does not divide model.num_ways=4; choose \[1, 2, 4\]"):
            run_config(3, way=3)

    def test_baselines_have_no_way_axis(self) -> None:
        with pytest.raises(ConfigError, match="cluster.way_size=2 does not divide model.num_ways=1"):
            run_config(2, way=2, model={"architecture": "standard", "num_ways": 1})

    def test_muon_needs_whole_matrices(self) -> None:
        run = run_config(2, shard=2)
        with pytest.raises(ConfigError, match="train.optimizer=muon needs whole matrices"):
            dataclasses.replace(run, train=dataclasses.replace(run.train, optimizer="muon"))

    def test_the_processes_must_fit_the_axes(self) -> None:
        with pytest.raises(ConfigError, match="num_workers=1 is not a multiple"), join_mesh(False, way_size=2):
            pass


@pytest.mark.parametrize(("count", "size"), [(4, 2), (65, 2), (65, 4), (6, 6), (3, 4)])
def test_parts_cover_everything_once(count: int, size: int) -> None:
    parts = [WayGroup(rank, size).part(count) for rank in range(size)]
    assert [index for part in parts for index in part] == list(range(count))


def test_the_largest_preset_is_never_whole_on_a_process() -> None:
    """A process's parameters are its part; on the meta device, since nothing has to be computed for that."""
    from kraken.model.architecture import Kraken, part_of, whole_shapes
    from kraken.presets import PRESETS

    config: ModelConfig = PRESETS["kraken_760m_4way"]().model
    with torch.device("meta"):
        held = [Kraken(config, WayGroup(rank, 4)) for rank in range(4)]
        wholes = {name: torch.empty(shape) for name, shape in whole_shapes(config).items()}
    for rank, model in enumerate(held):
        for name, parameter in model.named_parameters():
            assert parameter.shape == part_of(name, wholes[name], config, WayGroup(rank, 4)).shape, name
    largest = max(sum(p.numel() for p in model.parameters()) for model in held)
    assert largest < 0.26 * sum(whole.numel() for whole in wholes.values())
