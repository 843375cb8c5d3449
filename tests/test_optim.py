"""The optimizer: Muon on the matrices that parameters stack, AdamW on the rest; stopped and resumed without a trace."""

import dataclasses
from pathlib import Path

import pytest
import tiny
import torch

from kraken.checkpoint.history import read_history
from kraken.checkpoint.reader import CheckpointReader
from kraken.config import ModelConfig, RunConfig
from kraken.data.loader import Loader
from kraken.data.prefetch import Prefetcher
from kraken.data.shards import TokenShards
from kraken.model import Kraken, is_vector
from kraken.training.optim import Optimizer, is_hidden_matrix, matrices_of
from kraken.training.train import NoHooks, train

SWIGLU = {"activation": "swiglu", "positions": "rope"}


def muon_config(**model: str) -> RunConfig:
    run = tiny.config(optimizer="muon", learning_rate=1e-2)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **model))


def model_with_gradients(config: ModelConfig) -> Kraken:
    model = Kraken(config)
    model.init_weights(seed=1)
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(len(name))
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("options", [{}, SWIGLU])
def test_muon_treats_every_stacked_matrix_by_itself(options: dict[str, str]) -> None:
    """The same update as torch's Muon gives to plain copies: one per way and per q, k, v, gate and value."""
    run = muon_config(**options)
    model = model_with_gradients(run.model)
    copies = {
        name: [torch.nn.Parameter(part.detach().clone()) for part in matrices_of(name, parameter, model)]
        for name, parameter in model.named_parameters()
        if is_hidden_matrix(name)
    }
    for name, parts in copies.items():
        gradient = dict(model.named_parameters())[name].grad
        assert gradient is not None
        for part, part_gradient in zip(parts, matrices_of(name, gradient, model), strict=True):
            part.grad = part_gradient.clone()
    assert {len(parts) for name, parts in copies.items() if "c_attn" in name} == {2 * 3}
    assert {len(parts) for name, parts in copies.items() if "c_fc" in name} == {4 if options else 2}
    every_part = [part for parts in copies.values() for part in parts]
    torch.optim.Muon(
        every_part, lr=1e-2, weight_decay=0.1, momentum=run.train.beta2, adjust_lr_fn="match_rms_adamw"
    ).step()

    Optimizer(run.train, model).step(1e-2)

    for name, parameter in model.named_parameters():
        if name in copies:
            for found, expected in zip(matrices_of(name, parameter, model), copies[name], strict=True):
                torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_muon_leaves_embeddings_and_vectors_to_adamw() -> None:
    run = muon_config()
    model = model_with_gradients(run.model)
    optimizer = Optimizer(run.train, model)
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
    whole, stopped = (
        CheckpointReader(tmp_path / name / "step_000000006").whole("model") for name in ("whole", "stopped")
    )
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
