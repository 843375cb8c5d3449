"""The C kernels of a CPU, compiled for this machine: linears, residual add + norm, attention over paged keys and
values, and sampling.

torch has neither a product of a few tokens at the speed of memory nor attention over paged keys and values, and needs
dozens of operators for sampling. `load_library` compiles `kernels.c` for one type when a model is loaded; `CpuKernels`
calls the library.

In bfloat16 weights are half the bytes, which decoding waits for. Sums are float32, also on processors without
instructions for bfloat16.
"""

import contextlib
import ctypes
import functools
import logging
import mmap
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.c")
HUGE_PAGE = 2 << 20
WORD_BYTES = 4
"""Bytes that a linear multiplies at a time: one float32, or two inputs of a token in bfloat16."""
COMPILE_TIMEOUT_S = 60.0
PAUSE_SOFTLY = 1
"""OpenMP's `omp_pause_soft`: its settings stay."""
_logger = logging.getLogger(__name__)


class CpuLibrary:
    """A compiled library. Tensors are on the CPU and of its type unless noted; the caller ensures shapes and
    strides."""

    def __init__(self, path: Path, dtype: torch.dtype):
        self.dtype = dtype
        library = ctypes.CDLL(str(path))  # releases the interpreter's lock during a call
        pointer: Any
        count: Any
        flag: Any
        pointer, count, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        self._linear, self._store, self._attend = library.kraken_linear, library.kraken_store, library.kraken_attend
        self._linear.argtypes = [*[pointer] * 4, *[count] * 4, *[flag] * 3]
        self._store.argtypes = [pointer, pointer, count, count, pointer, pointer, count, pointer, *[count] * 3]
        self._attend.argtypes = [
            *[pointer, count, count, pointer, pointer, count, pointer, pointer, pointer],
            *[*[count] * 5, ctypes.c_float, pointer, flag],
        ]
        self._store.restype = self._attend.restype = None
        self._add_norm = library.kraken_add_norm
        self._add_norm.argtypes = [*[pointer] * 7, *[count] * 3, ctypes.c_float, *[flag] * 3]
        self._add_norm.restype = None
        self._attend_prompt_chunk, self._sample = library.kraken_attend_prompt_chunk, library.kraken_sample
        self._attend_prompt_chunk.argtypes = [
            *[pointer, count, count, pointer, pointer, count, pointer],
            *[*[count] * 5, ctypes.c_float, pointer, flag],
        ]
        self._sample.argtypes = [pointer, *[count] * 3, *[pointer] * 6, flag]
        self.panel: int = library.kraken_panel()
        """Outputs of a linear that lie side by side in packed weights."""
        self._word = WORD_BYTES // dtype.itemsize
        # of the OpenMP library that this is linked to; torch's, if that is of the same vendor
        self._pause_threads: Any = getattr(library, "omp_pause_resource_all", None)

    def release_threads(self) -> None:
        """End the OpenMP threads of the calling thread; the next call starts new ones.

        OpenMP keeps workers for every thread that has computed. With more workers than cores none of them spins before
        it sleeps, and waking one takes longer than a small product: without this the engine's thread decodes at half
        the speed after another thread has loaded the model.
        """
        if self._pause_threads is not None:
            self._pause_threads(PAUSE_SOFTLY)

    def can_compute(self, num_inputs: int) -> bool:
        """Whether this number of inputs is a multiple of what a linear multiplies at a time."""
        return num_inputs % self._word == 0

    def pack_weights(self, weight_WOI: Tensor) -> Tensor:
        """Weights in the order in which the kernel reads them: [W, panels, I / word, outputs of a panel, word]."""
        num_ways, num_outputs, num_inputs = weight_WOI.shape
        num_panels, whole = -(-num_outputs // self.panel), num_outputs // self.panel
        packed = zeros_in_huge_pages(
            (num_ways, num_panels, num_inputs // self._word, self.panel, self._word), self.dtype
        )
        words = weight_WOI.unflatten(2, (-1, self._word)).transpose(1, 2)
        packed[:, :whole] = words[:, :, : whole * self.panel].unflatten(2, (whole, self.panel)).transpose(1, 2)
        if whole < num_panels:
            packed[:, whole, :, : num_outputs - whole * self.panel] = words[:, :, whole * self.panel :]
        return packed

    def linear(self, x_WTI: Tensor, weights: Tensor, bias_WO: Tensor | None, y_WTO: Tensor, gelu: bool) -> None:
        """Write y = x W^T + bias of every way, then GELU (tanh form) if asked. All tensors are contiguous.

        Args:
            weights: from `pack_weights`.
            bias_WO: float32.
            y_WTO: float32, or of the library's type.
        """
        failed = self._linear(
            *_pointers(x_WTI, weights, bias_WO, y_WTO), *x_WTI.shape[:2], x_WTI.shape[2] // self._word, y_WTO.shape[2],
            y_WTO.dtype == torch.float32, gelu, torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for a linear of {x_WTI.shape[1]} tokens and {x_WTI.shape[2]} inputs")

    def add_norm(
        self, x_WTD: Tensor, addend_WTD: Tensor, gain_WD: Tensor | None, bias_WD: Tensor | None, epsilon: float,
        part_1TD: Tensor | None = None, adds_ways: bool = False, is_total: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """x + addend, and with a gain its LayerNorm; with `adds_ways` that of `TorchKernels.add_reduced_norm`."""
        given = (x_WTD, addend_WTD, part_1TD, gain_WD, bias_WD)
        contiguous = [None if tensor is None else tensor.contiguous() for tensor in given]
        out_WTD = x_WTD.new_empty(x_WTD.shape)
        normed_WTD = None if gain_WD is None else x_WTD.new_empty(x_WTD.shape)
        self._add_norm(
            *_pointers(*contiguous, out_WTD, normed_WTD), *x_WTD.shape, epsilon, adds_ways, is_total,
            torch.get_num_threads(),
        )  # fmt: skip
        return out_WTD, normed_WTD

    def store(self, k_TNH: Tensor, v_TNH: Tensor, keys_NSH: Tensor, values_NSH: Tensor, slots_T: Tensor) -> None:
        """Write keys and values to their slots. k and v have equal strides; their last dimension is contiguous."""
        self._store(
            *_pointers(k_TNH, v_TNH), *k_TNH.stride()[:2], *_pointers(keys_NSH, values_NSH), keys_NSH.shape[1],
            *_pointers(slots_T), *k_TNH.shape,
        )  # fmt: skip

    def attend(
        self, q_TNH: Tensor, keys_NSH: Tensor, values_NSH: Tensor, rows_B: Tensor, tables_BM: Tensor, lengths_B: Tensor,
        tokens_per_block: int, out_TNH: Tensor,
    ) -> None:  # fmt: skip
        """Write the attention of one token of each of B sequences. Its key and value are stored already.

        Args:
            rows_B: int64, the tokens' rows in T.
            tables_BM: int32 block tables.
            lengths_B: int64, number of keys that each token sees.
        """
        _, num_heads, head_size = q_TNH.shape
        self._attend(
            *_pointers(q_TNH), *q_TNH.stride()[:2], *_pointers(keys_NSH, values_NSH), keys_NSH.shape[1],
            *_pointers(rows_B, tables_BM, lengths_B), tables_BM.shape[1], tokens_per_block, len(rows_B), num_heads,
            head_size, head_size**-0.5, *_pointers(out_TNH), torch.get_num_threads(),
        )  # fmt: skip

    def attend_prompt_chunk(
        self, q_TNH: Tensor, keys_NSH: Tensor, values_NSH: Tensor, blocks_M: Tensor, first_position: int,
        tokens_per_block: int, out_TNH: Tensor,
    ) -> None:  # fmt: skip
        """Write the attention of neighbouring tokens of one sequence. Their keys and values are stored already.

        Args:
            blocks_M: int32 block table.
            first_position: of the tokens.
            out_TNH: contiguous.
        """
        num_tokens, num_heads, head_size = q_TNH.shape
        failed = self._attend_prompt_chunk(
            *_pointers(q_TNH), *q_TNH.stride()[:2], *_pointers(keys_NSH, values_NSH), keys_NSH.shape[1],
            *_pointers(blocks_M), tokens_per_block, first_position, num_tokens, num_heads, head_size, head_size**-0.5,
            *_pointers(out_TNH), torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for the attention of {num_tokens} tokens from position {first_position}")

    def sample(
        self, logits_BV: Tensor, top_k_B: Tensor, temperature_B: Tensor, top_p_B: Tensor, min_p_B: Tensor,
        uniform_B: Tensor,
    ) -> Tensor:  # fmt: skip
        """int64 [B]: the next token of every row, or -1 where the logits are not finite. Of equal logits truncation
        keeps the lowest ids.

        Args:
            logits_BV: float32 in any library; its last dimension is contiguous.
            top_k_B: int64.
            temperature_B, top_p_B, min_p_B: float32.
            uniform_B: float64.
        """
        chosen_B = torch.empty(len(logits_BV), dtype=torch.int64)
        failed = self._sample(
            *_pointers(logits_BV), logits_BV.stride(0), *logits_BV.shape,
            *_pointers(top_k_B, temperature_B, top_p_B, min_p_B, uniform_B, chosen_B), torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory to sample from {logits_BV.shape[1]} ids")
        return chosen_B


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


@functools.cache
def load_library(dtype: torch.dtype) -> CpuLibrary | None:
    """The library for float32 or bfloat16, compiled once per process and type. None without a C compiler that has
    OpenMP."""
    compiler = next(
        (found for name in (os.environ.get("CC"), "cc", "gcc") if name and (found := shutil.which(name))), None
    )
    if compiler is None:
        _logger.info("no C compiler found: the engine computes with torch's operators")
        return None
    tuning = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    with tempfile.TemporaryDirectory(prefix="kraken-kernels-") as folder:
        library = Path(folder) / "kernels.so"
        options = ["-O3", tuning, "-fopenmp", "-shared", "-fPIC", *(["-DBFLOAT16"] if dtype == torch.bfloat16 else [])]
        command = [compiler, *options, str(SOURCE), "-o", str(library), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
            return CpuLibrary(library, dtype)
        except (OSError, subprocess.SubprocessError) as error:
            reason = str(getattr(error, "stderr", None) or error).strip()
            _logger.info("the engine computes with torch's operators, since %s failed: %s", compiler, reason)
            return None


def zeros_in_huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in pages of 2 MB if the system has them: memory is read a fifth faster than in pages of 4 KB."""
    num_values = torch.Size(shape).numel()
    num_pages = -(-num_values * dtype.itemsize // HUGE_PAGE)
    if num_values * dtype.itemsize < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    pages = mmap.mmap(-1, num_pages * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a Linux kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=num_values).view(shape)
