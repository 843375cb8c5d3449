"""The exchange format: whatever a model's shape, the folder gives back the shape and every logit."""

import dataclasses
from pathlib import Path

import pytest
import tiny
import torch
from test_model import VARIANTS, small

from kraken.config import ModelConfig
from kraken.convert import exchange_shapes, read_exchange, read_model_config, to_exchange, write_folder
from kraken.model import Kraken
from kraken.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    corpus = tiny.corpus(tmp_path_factory.mktemp("corpus"))
    return Tokenizer.train((document.text for document in corpus.documents), 300)


def wide(config: ModelConfig) -> ModelConfig:
    """A shape whose vocabulary has room for the tokenizer's 301 ids."""
    return dataclasses.replace(config, vocab_size=320)


def float32_model(config: ModelConfig) -> Kraken:
    model = Kraken(config).requires_grad_(False)
    for index, parameter in enumerate(model.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.3)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_keeps_its_logits(variant: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = float32_model(wide(VARIANTS[variant]))
    write_folder(tmp_path, model.config, to_exchange(model), tokenizer)
    assert read_model_config(tmp_path)[0] == model.config
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    assert torch.equal(read_exchange(tmp_path, torch.float32)(ids), model(ids))


def test_every_field_of_the_shape_survives(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = wide(small(1, architecture="parallel", activation="swiglu", positions="rope", rope_base=5e5, bias=True))
    with_defaults = [f for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING]
    assert all(getattr(config, field.name) != field.default for field in with_defaults)
    write_folder(tmp_path, config, to_exchange(float32_model(config)), tokenizer)
    assert read_model_config(tmp_path)[0] == config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_stored_type_is_kept_and_named(dtype: torch.dtype, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = float32_model(wide(small(2))).to(dtype)
    write_folder(tmp_path, model.config, to_exchange(model), tokenizer)
    assert read_model_config(tmp_path)[1]["dtype"] == str(dtype).removeprefix("torch.")
    for (name, found), expected in zip(
        read_exchange(tmp_path, dtype).named_parameters(), model.parameters(), strict=True
    ):
        assert torch.equal(found, expected), name


def test_shapes_are_known_without_memory() -> None:
    model = float32_model(small(2, bias=True))
    assert exchange_shapes(model.config) == {name: tensor.shape for name, tensor in to_exchange(model).items()}
