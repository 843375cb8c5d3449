"""The model against a naive loop over the ways, written here on its own, in float64."""

import math
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F

import kraken.model.loss
from kraken.config import ModelConfig
from kraken.model.alignment import Alignment
from kraken.model.architecture import Kraken
from kraken.presets import PRESETS


def small(num_ways: int, **changes: Any) -> ModelConfig:
    shape: dict[str, Any] = {"num_layers": 3, "width": 16, "num_heads": 4, "context_length": 12, "vocab_size": 64}
    return ModelConfig(**(shape | {"num_ways": num_ways, "ffn_multiple": 3} | changes))


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

    def linear(x: torch.Tensor, name: str, way: int | None = None) -> torch.Tensor:
        weight, bias = parameters[f"{name}.weight"], parameters.get(f"{name}.bias")
        if way is not None:
            weight, bias = weight[way], None if bias is None else bias[way]
        return x @ weight.T if bias is None else x @ weight.T + bias

    def norm(x: torch.Tensor, name: str, way: int | None = None) -> torch.Tensor:
        gain, bias = parameters[f"{name}.weight"], parameters.get(f"{name}.bias", torch.zeros(1))
        if way is not None:
            gain, bias = gain[way], bias[way] if bias.dim() == 2 else bias
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5) * gain + bias

    def turn(x: torch.Tensor) -> torch.Tensor:
        """Rotary positions as a product of complex numbers; [B, T, H]."""
        if config.positions == "learned":
            return x
        half = head_size // 2
        frequencies = config.rope_base ** (-2 * torch.arange(half, dtype=torch.float64) / head_size)
        angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequencies
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag], dim=-1)

    def attention(x: torch.Tensor, layer: int, way: int) -> torch.Tensor:
        q, k, v = linear(x, f"h.{layer}.attn.c_attn", way).split(config.width, dim=-1)
        heads = []
        for head in range(num_heads):
            part = slice(head * head_size, (head + 1) * head_size)
            query, key = turn(q[..., part]), turn(k[..., part])
            rows = []
            for t in range(x.shape[1]):
                scores = (key[:, : t + 1] @ query[:, t, :, None]).squeeze(-1) / math.sqrt(head_size)
                rows.append((scores.softmax(-1)[:, None] @ v[:, : t + 1, part]).squeeze(1))
            heads.append(torch.stack(rows, dim=1))
        return linear(torch.cat(heads, dim=-1), f"h.{layer}.attn.c_proj", way)

    def mlp(x: torch.Tensor, layer: int, way: int) -> torch.Tensor:
        hidden = linear(x, f"h.{layer}.mlp.c_fc", way)
        if config.activation == "swiglu":
            gate, hidden = hidden.split(config.ffn_size, dim=-1)
            hidden = gate * torch.sigmoid(gate) * hidden
        else:
            hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        return linear(hidden, f"h.{layer}.mlp.c_proj", way)

    x = parameters["wte.weight"][ids]
    if config.positions == "learned":
        x = x + parameters["wpe.weight"][: ids.shape[1]]
    ways = [x] * config.num_ways
    earlier = None  # the inputs of the layer before
    for layer in range(config.num_layers):
        outputs = []
        for way, x in enumerate(ways):
            if config.architecture == "kraken_delayed":
                others = [] if earlier is None else [y for other, y in enumerate(earlier) if other != way]
                normed = norm(sum(others, start=x), f"h.{layer}.ln_1", way)
                outputs.append(x + attention(normed, layer, way) + mlp(normed, layer, way))
                continue
            normed = norm(x, f"h.{layer}.ln_1", way)
            a = x + attention(normed, layer, way)
            if config.architecture == "parallel":
                outputs.append(a + mlp(normed, layer, way))
                continue
            seen = a
            if layer > 0:
                for other, y in enumerate(ways):
                    if other != way:
                        seen = seen + y
            outputs.append(a + mlp(norm(seen, f"h.{layer}.ln_2", way), layer, way))
        earlier, ways = ways, outputs
    y = linear(torch.cat(ways, dim=-1), "conjunction") if "conjunction.weight" in parameters else ways[0]
    return norm(y, "ln_f") @ parameters["wte.weight"].T


VARIANTS = {
    "kraken_1way": small(1),
    "kraken_2way": small(2),
    "kraken_4way": small(4),
    "kraken_6way": small(6, width=14, num_heads=12),
    "kraken_delayed": small(4, architecture="kraken_delayed"),
    "everything_delayed": small(
        2, architecture="kraken_delayed", positions="rope", activation="swiglu", bias=True, num_layers=2
    ),
    "standard": small(1, architecture="standard"),
    "parallel": small(1, architecture="parallel"),
    "bias": small(2, bias=True),
    "rope": small(2, positions="rope"),
    "swiglu": small(2, activation="swiglu"),
    "compiled": small(2, num_layers=2),
    "everything": small(2, positions="rope", activation="swiglu", bias=True),
    "everything_standard": small(1, architecture="standard", positions="rope", activation="swiglu", bias=True),
    "everything_parallel": small(1, architecture="parallel", positions="rope", activation="swiglu", bias=True),
}


def batch(length: int = 13) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(64, (2, length), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1], ids[:, 1:]


def require_equal_gradients(found: Kraken, expected: dict[str, torch.Tensor]) -> None:
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name].grad, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_equal_a_naive_loop_over_ways(variant: str) -> None:
    config = VARIANTS[variant]
    model = float64_model(config)
    inputs, targets = batch()

    logits = model(inputs)
    tiny.next_token_loss(logits, targets).backward()

    copies = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = naive_logits(copies, config, inputs)
    F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum").backward()

    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    require_equal_gradients(model, copies)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("alignment", [Alignment(), Alignment(width=8, head_size=8), Alignment(width=64, head_size=32)])
def test_loss_in_chunks_and_padding_change_nothing(
    variant: str, alignment: Alignment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training path (padded sizes, no whole logits) against the plain one, gradients included."""
    monkeypatch.setitem(kraken.model.loss.LOGITS_PER_CHUNK, "cpu", 64 * 7)  # 24 tokens in chunks of at most 7
    model, plain = float64_model(VARIANTS[variant]), float64_model(VARIANTS[variant])
    inputs, targets = batch()
    model.align(alignment)
    loss = model.loss(inputs, targets)
    (loss / 3).backward()
    expected = tiny.next_token_loss(plain(inputs), targets)
    (expected / 3).backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    require_equal_gradients(model, dict(plain.named_parameters()))
    with torch.no_grad():
        torch.testing.assert_close(model.loss(inputs, targets), expected, rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["compiled", "everything", "everything_parallel", "everything_delayed"])
def test_compiled_parts_compute_the_same(variant: str) -> None:
    model, plain = float64_model(VARIANTS[variant]), float64_model(VARIANTS[variant])
    inputs, targets = batch()
    model.compile_parts()
    loss, expected = model.loss(inputs, targets), plain.loss(inputs, targets)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    require_equal_gradients(model, dict(plain.named_parameters()))


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
    loss = tiny.next_token_loss(model(ids[:, :-1]), ids[:, 1:]) / 128
    assert abs(loss.item() - math.log(config.vocab_size)) < 0.1


def test_initial_weights_follow_the_published_rule() -> None:
    config = ModelConfig(num_layers=2, width=64, num_heads=4, num_ways=4, context_length=64, vocab_size=1024)
    model = Kraken(config)
    model.init_weights(seed=0)
    parameters = dict(model.named_parameters())
    projection_std = 0.02 / math.sqrt(2 * config.num_layers * config.num_ways)
    assert parameters["wte.weight"].std().item() == pytest.approx(0.02, rel=0.05)
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
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == PUBLISHED_MILLIONS[name]
