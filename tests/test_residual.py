"""What stands between the products of an engine's layer: the Triton kernels against the plain operations.

Without CUDA by Triton's interpreter, where that is installed.
"""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from test_cpu_kernels import library_of
from torch import Tensor

from kraken.engine.kernels.cpu.kernels import CpuKernels
from kraken.engine.kernels.norm import Norm
from kraken.engine.kernels.torch.kernels import TorchKernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def make_norm(num_ways: int, width: int, has_bias: bool) -> Norm:
    gain, bias = (torch.randn(num_ways, width, device=DEVICE) for _ in range(2))
    return Norm(gain, bias if has_bias else None)


def layer_norm(x_WTD: Tensor, norm: Norm) -> Tensor:
    """Of each way, in float64."""
    normed_WTD = F.layer_norm(x_WTD.double(), x_WTD.shape[-1:], eps=1e-5) * norm.weight_WD.double()[:, None]
    return normed_WTD if norm.bias_WD is None else normed_WTD + norm.bias_WD.double()[:, None]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_ways", [1, 3])
@pytest.mark.parametrize(("num_tokens", "width"), [(4, 24), (1, 5), (1000, 75)])  # one thread, few values, all threads
@pytest.mark.parametrize("by_kernel", [False, True])
def test_on_a_cpu_they_are_the_equations(
    by_kernel: bool, num_tokens: int, width: int, num_ways: int, has_bias: bool
) -> None:
    kernels = CpuKernels(library_of(torch.float32)) if by_kernel else TorchKernels()
    torch.manual_seed(0)
    x_WTD, y_WTD = torch.randn(2, num_ways, num_tokens, width, device="cpu")
    others_1TD = torch.randn(1, num_tokens, width)
    norm = make_norm(num_ways, width, has_bias)
    norm = Norm(norm.weight_WD.cpu(), None if norm.bias_WD is None else norm.bias_WD.cpu())
    a_WTD, normed_WTD = kernels.add_norm(x_WTD, y_WTD, norm)
    assert normed_WTD is not None
    assert torch.equal(a_WTD, x_WTD + y_WTD)
    torch.testing.assert_close(normed_WTD.double(), layer_norm(a_WTD, norm), rtol=0, atol=1e-5)
    total_1TD = x_WTD.sum(0, keepdim=True) + others_1TD
    expected_WTD = layer_norm(a_WTD + total_1TD - x_WTD, norm)
    for part_1TD, is_total in ((others_1TD, False), (total_1TD, True)):
        a_WTD, normed_WTD = kernels.add_reduced_norm(x_WTD, y_WTD, norm, part_1TD, is_total)
        torch.testing.assert_close(normed_WTD.double(), expected_WTD, rtol=0, atol=2e-5)
    _, normed_WTD = kernels.add_reduced_norm(x_WTD, y_WTD, norm)
    expected_WTD = layer_norm(x_WTD + y_WTD + x_WTD.sum(0) - x_WTD, norm)
    torch.testing.assert_close(normed_WTD.double(), expected_WTD, rtol=0, atol=2e-5)
    assert kernels.add_norm(x_WTD, y_WTD, None)[1] is None
    one_WTD = x_WTD[:1].expand(num_ways, -1, -1)  # as all ways begin
    torch.testing.assert_close(
        kernels.add_reduced_norm(one_WTD, y_WTD, norm), kernels.add_reduced_norm(one_WTD.clone(), y_WTD, norm)
    )


@pytest.mark.parametrize("num_ways", [1, 3])
def test_on_a_cpu_bfloat16_is_rounded_once(num_ways: int) -> None:
    """The sum of residuals as torch rounds it, and a norm of it and of the float32 sum of the others."""
    kernels = CpuKernels(library_of(torch.bfloat16))
    torch.manual_seed(0)
    x_WTD, y_WTD = torch.randn(2, num_ways, 6, 75, device="cpu").bfloat16()
    others_1TD = torch.randn(1, 6, 75).bfloat16()
    norm = Norm(torch.randn(num_ways, 75).bfloat16(), torch.randn(num_ways, 75).bfloat16())
    total_1TD = x_WTD.double().sum(0, keepdim=True) + others_1TD
    for part_1TD, sees in ((None, False), (others_1TD, True)):
        if sees:
            a_WTD, normed_WTD = kernels.add_reduced_norm(x_WTD, y_WTD, norm, part_1TD)
        else:
            a_WTD, normed_WTD = kernels.add_norm(x_WTD, y_WTD, norm)
        assert normed_WTD is not None and torch.equal(a_WTD, x_WTD + y_WTD)
        expected_WTD = layer_norm(a_WTD + (total_1TD - x_WTD if sees else 0.0), norm)
        torch.testing.assert_close(normed_WTD.double(), expected_WTD, rtol=2**-8, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("are_ways_one", [False, True], ids=["ways", "one_way_expanded"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_ways", [1, 3])
def test_the_kernels_equal_the_plain_operations(
    num_ways: int, has_bias: bool, are_ways_one: bool, dtype: torch.dtype
) -> None:
    from kraken.engine.kernels.cuda import residual_norm as residual_kernel

    torch.manual_seed(0)
    T, D = 5, 40
    atol = 2e-5 if dtype == torch.float32 else 0.06
    rtol = 0.0 if DEVICE == "cuda" or dtype == torch.float32 else 2**-7  # the interpreter cuts bfloat16 off
    norm = make_norm(num_ways, D, has_bias)
    norm = Norm(norm.weight_WD.to(dtype), None if norm.bias_WD is None else norm.bias_WD.to(dtype))
    x_WTD, y_WTD = torch.randn(2, num_ways, T, D, device=DEVICE).to(dtype)
    if are_ways_one:
        x_WTD = x_WTD[:1].expand(num_ways, -1, -1)
    a_WTD, normed_WTD = residual_kernel.add_norm(x_WTD, y_WTD, norm)
    assert normed_WTD is not None and normed_WTD.dtype == dtype
    torch.testing.assert_close(a_WTD, x_WTD + y_WTD, rtol=rtol, atol=0)
    torch.testing.assert_close(normed_WTD.double(), layer_norm(a_WTD, norm), rtol=0, atol=atol)
    assert residual_kernel.add_norm(x_WTD, y_WTD, None)[1] is None
    others_TD = torch.randn(T, D, device=DEVICE).to(dtype)
    x = x_WTD.double()
    for parts, is_total, added in (
        ((), False, x.sum(0)),
        ((others_TD.flatten(), others_TD.flatten()), False, x.sum(0) + 2 * others_TD.double()),
        ((others_TD[None],), True, others_TD.double()),
    ):
        seen_WTD, normed_WTD = residual_kernel.add_reduced_norm(x_WTD, y_WTD, norm, parts, is_total)
        assert torch.equal(seen_WTD, a_WTD)
        torch.testing.assert_close(normed_WTD.double(), layer_norm(a_WTD.double() + added - x, norm), rtol=0, atol=atol)
