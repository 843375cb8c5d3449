"""The fused norm against plain operations, forward and backward; without CUDA by Triton's interpreter."""

import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kraken.model.residual_norm import LAYER_NORM_EPSILON

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # the interpreter computes in NumPy's types
B, T = 2, 3


KINDS = ["alone", "alone_summed", "added", "summed", "reduced"]


def plain(x: Tensor, addend: Tensor | None, total: Tensor | None, width: int, is_summed: bool) -> list[Tensor]:
    """a, n and the sum over the ways, the first and the last empty where they are not asked for."""
    W, D = x.shape[0], x.shape[-1]
    a = x if addend is None else x + addend[..., :D]
    rows = []
    for way in range(W):
        others = torch.zeros_like(x[0]) if total is None else total[0] - x[way]
        rows.append(F.layer_norm(a[way] + others, (D,), eps=LAYER_NORM_EPSILON))
    nothing = x.new_empty(0)
    normed = F.pad(torch.stack(rows), (0, width - D))
    return [nothing if addend is None else a, normed, a.sum(0, keepdim=True) if is_summed else nothing]


def inputs(W: int, D: int, P: int, kind: str, dtype: torch.dtype) -> tuple[list[Tensor | None], bool]:
    """x, addend and total as leaves, where the kind has them."""
    torch.manual_seed(W * 100 + D)
    x = torch.randn(B, T, W, D, device=DEVICE).permute(2, 0, 1, 3)  # a token's ways side by side, as in the model
    addend = None if kind.startswith("alone") else torch.randn(W, B, T, P, device=DEVICE)
    total = torch.randn(1, B, T, D, device=DEVICE) * 3 if kind == "reduced" else None
    leaves = [None if y is None else y.to(dtype).detach().requires_grad_() for y in (x, addend, total)]
    return leaves, kind.endswith("summed")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("W", "D", "P"), [(1, 8, 8), (2, 13, 16), (3, 20, 24), (4, 16, 16), (6, 5, 8)])
def test_equals_plain_operations_and_their_gradients(W: int, D: int, P: int, kind: str) -> None:
    leaves, is_summed = inputs(W, D, P, kind, torch.float32)
    a, n, _, total = torch.ops.kraken.residual_norm(*leaves, P, torch.float32 if is_summed else None)
    found, expected = [a, n, total], plain(*leaves, P, is_summed)
    used = [leaf for leaf in leaves if leaf is not None]
    weights = [torch.randn_like(y) for y in expected]

    def gradients(outputs: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)), used)

    for ours, theirs in [*zip(found, expected, strict=True), *zip(gradients(found), gradients(expected), strict=True)]:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert not n[..., D:].any()


def test_rounds_what_it_adds_as_plain_operations_do() -> None:
    leaves, _ = inputs(2, 24, 24, "reduced", HALF)
    a, n, _, _ = torch.ops.kraken.residual_norm(*leaves, 24, None)
    assert torch.equal(a, leaves[0] + leaves[1])
    assert n.dtype == HALF
    exact = plain(*[y if y is None else y.double() for y in leaves], 24, False)[1]
    torch.testing.assert_close(n.double(), exact, rtol=0.02, atol=0.02)


def test_sums_what_it_has_rounded() -> None:
    leaves, _ = inputs(3, 24, 24, "summed", HALF)
    a, _, _, total = torch.ops.kraken.residual_norm(*leaves, 24, torch.float32)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, a.float().sum(0, keepdim=True), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_is_a_sound_operator(kind: str) -> None:
    leaves, is_summed = inputs(2, 13, 16, kind, torch.float32)
    torch.library.opcheck(torch.ops.kraken.residual_norm.default, (*leaves, 16, torch.float32 if is_summed else None))


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["kraken_125m_4way", "kraken_125m_6way", "gpt2_124m", "parallel_124m"])
def test_compiled_training_equals_plain_operations(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from kraken.model import Kraken, residual_norm
    from kraken.model.alignment import Alignment
    from kraken.presets import PRESETS

    config = dataclasses.replace(PRESETS[preset]().model, num_layers=3, context_length=64, vocab_size=512)

    def loss_and_gradients(compiles: bool) -> list[Tensor]:
        with torch.device("cuda"):
            model = Kraken(config)
        model.init_weights(0)
        model.align(Alignment(width=64, head_size=8))
        if compiles:
            model.compile_parts()
        torch.manual_seed(0)
        ids = torch.randint(512, (2, 65), device="cuda")
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    ours = loss_and_gradients(compiles=True)
    monkeypatch.setattr(residual_norm, "_has_kernel", lambda x: False)
    plainly = loss_and_gradients(compiles=False)
    assert len(ours) == len(plainly)
    for found, expected in zip(ours, plainly, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
