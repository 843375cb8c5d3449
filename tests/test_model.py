"""The model against a naive loop over the ways, written here on its own, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from kraken.config import ModelConfig
from kraken.model import Kraken, next_token_loss
from kraken.presets import PRESETS


def small(num_ways: int, num_heads: int = 4) -> ModelConfig:
    return ModelConfig(
        num_layers=3, width=16, num_heads=num_heads, num_ways=num_ways, context_length=12, vocab_size=64, ffn_multiple=3
    )


def float64_model(config: ModelConfig) -> Kraken:
    model = Kraken(config).double()
    model.init_weights(seed=1)
    with torch.no_grad():  # gains of 1 and tiny matrices would hide a misplaced norm or sum
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def naive_logits(parameters: dict[str, torch.Tensor], config: ModelConfig, ids: torch.Tensor) -> torch.Tensor:
    """The equations one way, one head and one query position at a time."""
    num_heads, head_size = config.heads_per_way, config.head_size

    def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5) * gain

    def attention(x: torch.Tensor, layer: int, way: int) -> torch.Tensor:
        q, k, v = (x @ parameters[f"h.{layer}.attn.c_attn.weight"][way].T).split(config.width, dim=-1)
        rows = []
        for t in range(x.shape[1]):
            heads = []
            for head in range(num_heads):
                part = slice(head * head_size, (head + 1) * head_size)
                scores = (k[:, : t + 1, part] @ q[:, t, part, None]).squeeze(-1) / math.sqrt(head_size)
                heads.append((scores.softmax(-1)[:, None] @ v[:, : t + 1, part]).squeeze(1))
            rows.append(torch.cat(heads, dim=-1))
        return torch.stack(rows, dim=1) @ parameters[f"h.{layer}.attn.c_proj.weight"][way].T

    def mlp(x: torch.Tensor, layer: int, way: int) -> torch.Tensor:
        hidden = x @ parameters[f"h.{layer}.mlp.c_fc.weight"][way].T
        hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        return hidden @ parameters[f"h.{layer}.mlp.c_proj.weight"][way].T

    x = parameters["wte"][ids] + parameters["wpe"][: ids.shape[1]]
    ways = [x] * config.num_ways
    for layer in range(config.num_layers):
        outputs = []
        for way, x in enumerate(ways):
            a = x + attention(norm(x, parameters[f"h.{layer}.ln_1.weight"][way]), layer, way)
            seen = a
            if layer > 0:
                for other, y in enumerate(ways):
                    if other != way:
                        seen = seen + y
            outputs.append(a + mlp(norm(seen, parameters[f"h.{layer}.ln_2.weight"][way]), layer, way))
        ways = outputs
    y = norm(torch.cat(ways, dim=-1) @ parameters["conjunction"].T, parameters["ln_f"])
    return y @ parameters["wte"].T


@pytest.mark.parametrize("num_ways", [1, 2, 4])
def test_logits_and_gradients_equal_a_naive_loop_over_ways(num_ways: int) -> None:
    config = small(num_ways)
    model = float64_model(config)
    ids = torch.randint(64, (2, 13), generator=torch.Generator().manual_seed(0))
    inputs, targets = ids[:, :-1], ids[:, 1:]

    logits = model(inputs)
    next_token_loss(logits, targets).backward()

    copies = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = naive_logits(copies, config, inputs)
    F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum").backward()

    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, copies[name].grad, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_no_token_sees_the_future() -> None:
    model = float64_model(small(2))
    ids = torch.randint(64, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 64
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-12)
    assert (before[:, 7:] - after[:, 7:]).abs().max() > 1e-3


def test_initial_loss_is_that_of_a_uniform_guess() -> None:
    config = PRESETS["quickstart"]().model
    model = Kraken(config)
    model.init_weights(seed=0)
    ids = torch.randint(config.vocab_size, (2, 65), generator=torch.Generator().manual_seed(0))
    loss = next_token_loss(model(ids[:, :-1]), ids[:, 1:]) / 128
    assert abs(loss.item() - math.log(config.vocab_size)) < 0.1


def test_initial_weights_follow_the_published_rule() -> None:
    config = small(4)
    config = ModelConfig(num_layers=2, width=64, num_heads=4, num_ways=4, context_length=64, vocab_size=1024)
    model = Kraken(config)
    model.init_weights(seed=0)
    parameters = dict(model.named_parameters())
    projection_std = 0.02 / math.sqrt(2 * config.num_layers * config.num_ways)
    assert parameters["wte"].std().item() == pytest.approx(0.02, rel=0.05)
    assert parameters["h.1.attn.c_attn.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    for name in ("h.0.attn.c_proj.weight", "h.1.mlp.c_proj.weight"):
        assert parameters[name].std().item() == pytest.approx(projection_std, rel=0.05)
    ways = parameters["h.0.attn.c_attn.weight"]
    assert not torch.equal(ways[0], ways[1])
    assert torch.equal(parameters["h.0.ln_1.weight"], torch.ones(4, 64))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_on_the_meta_device(name: str) -> None:
    config = PRESETS[name]()
    with torch.device("meta"):
        model = Kraken(config.model)
        logits = model(torch.zeros(1, 8, dtype=torch.int64))
    assert logits.shape == (1, 8, config.model.vocab_size)
    c = config.model
    per_way = 3 * c.width**2 + c.width**2 + 2 * c.width * c.ffn_size + 2 * c.width
    shared = (c.vocab_size + c.context_length + c.num_ways * c.width + 1) * c.width
    assert model.num_parameters() == shared + c.num_layers * c.num_ways * per_way


PUBLISHED_MILLIONS = {
    "kraken_125m_2way": 124.01,
    "kraken_125m_4way": 124.48,
    "kraken_125m_6way": 123.21,
    "kraken_350m_2way": 350.04,
    "kraken_350m_4way": 353.36,
    "kraken_760m_4way": 760.94,
}


@pytest.mark.parametrize("name", PUBLISHED_MILLIONS)
def test_published_presets_have_the_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = Kraken(PRESETS[name]().model)
    assert round(model.num_parameters() / 1e6, 2) == PUBLISHED_MILLIONS[name]
