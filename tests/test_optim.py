"""The optimizer: Muon on the matrices that parameters stack, AdamW on the rest; stopped and resumed without a trace."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from kraken.checkpoint.history import read_history
from kraken.config import ModelConfig, RunConfig
from kraken.data.loader import Loader
from kraken.data.prefetch import Prefetcher
from kraken.data.shards import TokenShards
from kraken.model.architecture import Kraken, is_vector, part_of
from kraken.model.ways import WayGroup
from kraken.training import muon
from kraken.training.muon import MOMENTUM, Muon, is_hidden_matrix, matrices_of, orthogonalised
from kraken.training.optim import Optimizer
from kraken.training.train import NoHooks, train

SWIGLU = {"activation": "swiglu", "positions": "rope"}
DECAY = 0.1
RATES = (1e-2, 3e-2, 2e-2)
ALONE = WayGroup()


def muon_config(**model: str) -> RunConfig:
    run = tiny.config(optimizer="muon", learning_rate=1e-2)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **model))


def fill_gradients(model: Kraken, seed: int) -> None:
    """Gradients of the whole model, of which a process that holds some ways gets its part."""
    with torch.device("meta"):
        wholes = dict(Kraken(model.config).named_parameters())
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(1000 * seed + len(name))
        gradient = torch.randn(wholes[name].shape, generator=generator, dtype=torch.float64)
        parameter.grad = part_of(name, gradient, model.config, model.ways).to(parameter.dtype, copy=True)


def build(config: ModelConfig, dtype: torch.dtype = torch.float64, ways: WayGroup = ALONE) -> Kraken:
    model = Kraken(config, ways).to(dtype)
    model.init_weights(seed=1)
    fill_gradients(model, seed=0)
    return model


def copies_of_matrices(model: Kraken) -> dict[str, list[Tensor]]:
    return {
        name: [matrix.detach().clone() for matrix in matrices_of(name, parameter, model)]
        for name, parameter in model.named_parameters()
        if is_hidden_matrix(name)
    }


def assert_equal_matrices(model: Kraken, expected: dict[str, list[Tensor]], **tolerance: float) -> None:
    for name, found in copies_of_matrices(model).items():
        for index, (one, other) in enumerate(zip(found, expected[name], strict=True)):
            message: Callable[[str], str] = lambda m, n=name, i=index: f"{n}, matrix {i}: {m}"  # noqa: E731
            torch.testing.assert_close(one, other.detach(), **tolerance, msg=message)


def plain_muon(weights: Tensor, moment: Tensor, gradient: Tensor, rate: float) -> None:
    """Muon of one matrix as the papers write it, in the type of the matrix."""
    moment.mul_(MOMENTUM).add_((1 - MOMENTUM) * gradient)
    x = (1 - MOMENTUM) * gradient + MOMENTUM * moment
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    weights.mul_(1 - rate * DECAY).sub_(rate * 0.2 * math.sqrt(max(weights.shape)) * x)


@pytest.mark.parametrize("options", [{}, SWIGLU])
def test_a_parameter_is_many_matrices(options: dict[str, str]) -> None:
    model = build(muon_config(**options).model)
    D, F = model.config.width, model.config.ffn_size
    for name, matrices in copies_of_matrices(model).items():
        kind = next(k for k in ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", "conjunction") if k in name)
        each = {"c_attn": 3, "c_fc": 2 if options else 1}.get(kind, 1)
        assert len(matrices) == 2 * each, name
        assert {tuple(m.shape) for m in matrices} == {{"c_fc": (F, D), "mlp.c_proj": (D, F)}.get(kind, (D, D))}, name
    attention, conjunction = model.h[0].attn.c_attn.weight, model.conjunction.weight
    for way in range(2):
        for part in range(3):  # q, k, v
            rows = attention[way, part * D : (part + 1) * D]
            assert torch.equal(matrices_of("h.0.attn.c_attn.weight", attention, model)[3 * way + part], rows)
        block = matrices_of("conjunction.weight", conjunction, model)[way]
        assert torch.equal(block, conjunction[:, way * D : (way + 1) * D])


@pytest.mark.parametrize("options", [{}, SWIGLU])
@pytest.mark.parametrize("values_per_batch", [1, 2**24])
def test_muon_is_the_plain_loop(
    options: dict[str, str], values_per_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "VALUES_PER_BATCH", values_per_batch)
    model = build(muon_config(**options).model)
    expected = copies_of_matrices(model)
    moments = {name: [torch.zeros_like(m) for m in matrices] for name, matrices in expected.items()}
    batched = Muon(model, DECAY, torch.float64)
    for index, rate in enumerate(RATES):
        fill_gradients(model, seed=index)
        for name, matrices in expected.items():
            gradients = matrices_of(name, dict(model.named_parameters())[name].grad, model)
            for matrix, moment, gradient in zip(matrices, moments[name], gradients, strict=True):
                plain_muon(matrix, moment, gradient, rate)
        batched.step(rate)
        assert_equal_matrices(model, expected, rtol=0, atol=1e-12)


def test_muon_in_bfloat16_is_torchs() -> None:
    """To the rounding of bfloat16 in the update, of which a step moves a weight by about 0.2 of the rate."""
    model = build(muon_config().model, torch.float32)
    expected = {name: [torch.nn.Parameter(m) for m in ms] for name, ms in copies_of_matrices(model).items()}
    theirs = torch.optim.Muon(
        [m for matrices in expected.values() for m in matrices], weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"
    )
    assert theirs.defaults["momentum"] == MOMENTUM
    ours = Muon(model, DECAY, torch.bfloat16)
    for index, rate in enumerate(RATES):
        fill_gradients(model, seed=index)
        for name, matrices in expected.items():
            gradients = matrices_of(name, dict(model.named_parameters())[name].grad, model)
            for matrix, gradient in zip(matrices, gradients, strict=True):
                matrix.grad = gradient.clone()
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
        ours.step(rate)
        assert_equal_matrices(model, expected, rtol=0, atol=0.02 * sum(RATES[: index + 1]))


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 8, 24), (2, 24, 8)])
def test_singular_values_come_near_one(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    found = u.mT @ orthogonalised(x) @ v.mT
    values = found.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(found, torch.diag_embed(values), rtol=0, atol=1e-12)
    assert float(values.min()) > 0.6 and float(values.max()) < 1.25


def test_of_a_zero_matrix_nothing_comes() -> None:
    assert not orthogonalised(torch.zeros(1, 4, 8)).any()


@pytest.mark.parametrize("num_before", [0, 2])
def test_a_skipped_update_changes_nothing(num_before: int) -> None:
    model = build(muon_config().model)
    ours = Muon(model, DECAY, torch.float64)
    no, yes = torch.tensor(False), torch.tensor(True)
    for _ in range(num_before):
        ours.step(1e-2, no)
    weights = copies_of_matrices(model)
    moments = {name: moment.clone() for name, moment in ours.moments.items()}
    for parameter in ours.parameters.values():
        parameter.grad = torch.full_like(parameter, torch.nan)
    ours.step(1e-2, yes)
    assert_equal_matrices(model, weights, rtol=0, atol=0)
    for name, moment in ours.moments.items():
        assert torch.equal(moment, moments.get(name, torch.zeros_like(moment))), name


def test_a_switch_that_is_off_changes_nothing() -> None:
    plain, switched = (build(muon_config().model) for _ in range(2))
    Muon(plain, DECAY, torch.float64).step(1e-2)
    Muon(switched, DECAY, torch.float64).step(1e-2, torch.tensor(False))
    assert_equal_matrices(switched, copies_of_matrices(plain), rtol=0, atol=0)


def test_ways_that_are_divided_among_processes_are_updated_alike() -> None:
    config = muon_config(**SWIGLU).model
    whole = build(config)
    Muon(whole, DECAY, torch.float64).step(1e-2)
    for rank in range(2):
        ways = WayGroup(rank, 2)
        part = build(config, ways=ways)
        Muon(part, DECAY, torch.float64).step(1e-2)
        for name, parameter in whole.named_parameters():
            if is_hidden_matrix(name):
                expected = part_of(name, parameter, config, ways)
                torch.testing.assert_close(dict(part.named_parameters())[name], expected, rtol=0, atol=1e-12, msg=name)


def test_muon_leaves_embeddings_and_vectors_to_adamw() -> None:
    run = muon_config()
    model = build(run.model)
    optimizer = Optimizer(run.train, model, torch.float64)
    optimizer.step(1e-2)
    moments: dict[str, set[str]] = {}
    for key in optimizer.state():
        moment, _, name = key.partition(".")
        moments.setdefault(name, set()).add(moment)
    for name, parameter in model.named_parameters():
        by_adamw = is_vector(name) or name.startswith(("wte", "wpe"))
        assert moments[name] == ({"exp_avg", "exp_avg_sq"} if by_adamw else {"momentum_buffer"}), name
        assert optimizer.state()[f"{next(iter(moments[name]))}.{name}"].shape == parameter.shape


class Stop(NoHooks):
    def on_checkpoint(self, step: int, path: Path) -> None:
        if step == 4:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("optim") / "data"
    tiny.prepared(folder)
    return folder


def test_muon_learns_and_resumes_to_the_bit(data: Path, tmp_path: Path) -> None:
    run = muon_config(**SWIGLU)
    metrics = train(run, data, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(run, data, tmp_path / "stopped", Stop())
    train(run, data, tmp_path / "stopped")
    whole, stopped = (tiny.whole(tmp_path / name / "step_000000006", "model") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert metrics["final_validation_loss"].value < read_history(tmp_path / "whole")[0]["loss"]
    for a, b in zip(read_history(tmp_path / "whole"), read_history(tmp_path / "stopped"), strict=True):
        assert (a["step"], a["loss"]) == (b["step"], b["loss"])
        assert a["seconds"] > 0 and b["seconds"] > 0


def test_prefetched_batches_are_the_loaders(data: Path) -> None:
    loader = Loader(TokenShards(data, "train", 301), 32, 4, seed=7)
    with Prefetcher(loader, 1, 2, torch.device("cpu"), first_step=3, last_step=6) as batches:
        for step in range(3, 6):
            for found, expected in zip(batches.batch(step), loader.batch(step, 1, 2), strict=True):
                assert torch.equal(found, expected)
