"""The numbers of the rate of training, each derived a second way: counted, by another clock, by plain arithmetic."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from test_model import VARIANTS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kraken.model.architecture
from benchmarks import sharding
from benchmarks import train as training_benchmark
from kraken.model import Kraken
from kraken.plan.cost import forward_flops_per_token, num_parameters, training_flops_per_token
from kraken.training import rate, report
from kraken.training.optim import learning_rate
from kraken.training.rate import matrix_rate
from kraken.training.report import Reporter
from kraken.training.train import NoHooks, train

CPU = torch.device("cpu")


class SlowStart:
    """A clock by which a product takes `product_s`, and the first `num_cold` calls of the device a second more."""

    def __init__(self, product_s: float, num_cold: int):
        self.product_s, self.num_cold, self.num_products = product_s, num_cold, 0

    def __call__(self, run: Callable[[], object], count: int, device: torch.device) -> float:
        cold = max(0, min(count, self.num_cold - self.num_products))
        self.num_products += count
        run()
        return count * self.product_s + cold


@pytest.mark.parametrize("product_s", [1e-4, 1e-3, 0.5])
@pytest.mark.parametrize("num_cold", [0, 1, 5])
def test_a_slow_start_is_no_part_of_the_rate(product_s: float, num_cold: int) -> None:
    found = matrix_rate(torch.float32, CPU, timer=SlowStart(product_s, num_cold))
    assert found == pytest.approx(2 * rate.SIZES["cpu"] ** 3 / product_s, rel=1e-6)


class Products(TorchDispatchMode):
    """Keeps the operands of the products made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.out:
            self.operands = list(args)
        return func(*args, **(kwargs or {}))


def test_the_operations_are_counted_and_the_numbers_random() -> None:
    state, timer = torch.random.get_rng_state(), SlowStart(1e-2, 0)
    num_calls = 0

    def count_calls(run: Callable[[], object], count: int, device: torch.device) -> float:
        nonlocal num_calls
        num_calls += 1
        return timer(run, count, device)

    with FlopCounterMode(display=False) as counter, Products() as products:
        matrix_rate(torch.float32, CPU, timer=count_calls)
    assert counter.get_total_flops() == num_calls * 2 * rate.SIZES["cpu"] ** 3
    for operand in products.operands:
        assert operand.std().item() == pytest.approx(1.0, rel=0.05) and abs(operand.mean().item()) < 0.05
    assert torch.equal(torch.random.get_rng_state(), state)


def test_training_and_benchmarks_take_one_rate() -> None:
    users = (report, training_benchmark, sharding)
    assert all(user.matrix_rate is matrix_rate for user in users)
    assert all(user.training_flops_per_token is training_flops_per_token for user in users)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_rate_of_a_gpu_is_the_one_of_a_long_run(dtype: torch.dtype) -> None:
    """Other numbers, other outputs, the host's clock, and long enough for clocks and power to settle."""
    import time

    found = matrix_rate(dtype, torch.device("cuda"))
    size = rate.SIZES["cuda"]
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    for duration_s in (2.0, 2.0):  # the second is of a device that is warm
        torch.cuda.synchronize()
        num_products, started_at = 0, time.perf_counter()
        while time.perf_counter() - started_at < duration_s:
            for _ in range(10):
                a @ b
            torch.cuda.synchronize()
            num_products += 10
        seconds = time.perf_counter() - started_at
    assert found == pytest.approx(2 * size**3 * num_products / seconds, rel=0.05)


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_per_token_are_those_that_torch_counts(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward; torch counts every position of causal attention, as the formula does."""
    config = dataclasses.replace(VARIANTS[variant], context_length=16)
    monkeypatch.setattr(kraken.model.architecture, "FASTEST_ATTENTION_FIRST", [SDPBackend.MATH])
    model = Kraken(config)
    model.init_weights(0)
    ids = torch.randint(config.vocab_size, (3, config.context_length))
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            model.loss(ids, ids).backward()
        assert counter.get_total_flops() / ids.numel() == training_flops_per_token(config)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(ids)
    assert counter.get_total_flops() / ids.numel() == forward_flops_per_token(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters(config)


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def reporter_of(clock: Clock, monkeypatch: pytest.MonkeyPatch, **interval: float) -> Reporter:
    """Of a run of four steps on two of whose processes the loss is divided; its device multiplies 1e9 a second."""
    monkeypatch.setattr(report, "time", clock)
    monkeypatch.setattr(report, "matrix_rate", lambda dtype, device: 1e9)
    stopwatch = SimpleNamespace(read=lambda: 0.25)
    mesh = SimpleNamespace(size=2, data_rank=0, device=CPU, communication=stopwatch, sum=lambda x: 2 * x)
    control = SimpleNamespace(largest=lambda *numbers: list(numbers))
    checkpointer = SimpleNamespace(waiting=stopwatch, snapshot_waiting=stopwatch, num_failed=1)
    made = Reporter(tiny.config(steps=10), mesh, control, checkpointer, torch.float32, 2, [], interval)  # type: ignore[arg-type]
    made.data = stopwatch  # type: ignore[assignment]
    return made


def test_every_number_of_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, run = Clock(), tiny.config(steps=10)
    reporter = reporter_of(clock, monkeypatch)
    for loss in (3.0, 2.0):  # this rank's halves of 6 and 4
        clock.now += 2.0
        reporter.add(torch.tensor(loss))
    found = reporter.report(4, torch.tensor(0.5))
    tokens = 2 * 4 * 32  # steps, sequences, context
    assert found["loss"] == 5.0 and found["grad_norm"] == 0.5 and found["step"] == 4.0
    assert found["tokens"] == 4 * 4 * 32
    assert found["tokens_per_second"] == tokens / 4.0 == 2 * found["tokens_per_second_per_device"]
    assert found["mfu"] == pytest.approx(tokens * training_flops_per_token(run.model) / 4.0 / 2 / 1e9)
    assert found["learning_rate"] == learning_rate(run.train, 3)
    assert (found["seconds_in_data"], found["seconds_in_checkpoint"], found["seconds_in_communication"]) == (
        *(0.25, 0.5, 0.25),
    )
    assert found["seconds"] == 4.0 and found["failed_checkpoints"] == 1.0
    assert found["seconds_left"] == 6 * 2.0  # six steps at two seconds each
    clock.now += 100.0  # a validation
    reporter.restart_clock()
    clock.now += 1.0
    reporter.add(torch.tensor(1.0))
    later = reporter.report(5, torch.tensor(0.5))
    assert later["loss"] == 2.0 and later["tokens_per_second"] == 4 * 32 / 1.0
    assert later["seconds"] == 105.0


def test_steps_of_a_process_before_count_for_the_loss_and_not_for_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    reporter = reporter_of(clock, monkeypatch, loss_sum=8.0, steps=1, bad=0)
    reporter._loss_sum /= 2  # the stand-in of a mesh doubles what it sums
    clock.now += 2.0
    reporter.add(torch.tensor(1.0))
    found = reporter.report(3, torch.tensor(0.5))
    assert found["loss"] == (8.0 + 2.0) / 2
    assert found["tokens_per_second"] == 4 * 32 / 2.0


def test_what_training_reports_of_itself(data: Path, tmp_path: Path) -> None:
    """Perplexity and gradient norm of a real run; the norm is the one before clipping."""

    class Last(NoHooks):
        def on_step(self, metrics: dict[str, float]) -> None:
            self.metrics = metrics

    run, hooks = tiny.config(steps=1, warmup_steps=0, validate_every=1, log_every=1, clip_norm=1e-3), Last()
    finished = train(run, data, tmp_path, hooks)
    from kraken.data.loader import Loader
    from kraken.data.shards import TokenShards

    inputs, targets = Loader(TokenShards(data, "train", 301), 32, 4, run.train.seed).batch(0)
    model = Kraken(run.model)
    model.init_weights(run.train.seed)
    loss = model.double().loss(torch.as_tensor(inputs), torch.as_tensor(targets)) / (4 * 32)
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    assert hooks.metrics["grad_norm"] == pytest.approx(norm, rel=1e-9)
    assert hooks.metrics["loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert hooks.metrics["validation_perplexity"] == math.exp(hooks.metrics["validation_loss"])
    assert finished["training_flops_per_token"].value == training_flops_per_token(run.model)
    assert finished["parameters"].value == sum(p.numel() for p in model.parameters())
    tokens = finished["train_tokens"].value
    assert finished["mean_tokens_per_second"].value == pytest.approx(tokens / finished["training_seconds"].value)
