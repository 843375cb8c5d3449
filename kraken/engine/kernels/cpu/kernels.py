"""The engine's own kernels on a CPU, in float32 and bfloat16: linears, what stands between them, attention over paged
keys and values, drawing.

torch has neither a product of a few tokens that runs at the speed of memory nor attention over paged keys and values;
the rest takes it dozens of operators, each of which is slow to start when a step's weights have just passed the caches.
`kernels.c` is compiled for this machine and a type when an engine first asks, which takes about a second; where
there is no C compiler with OpenMP, the engine computes the same with torch's operators, slower.

In bfloat16 weights are half the bytes, which is what decoding waits for. Sums are float32, also on processors that have
no instructions for the type.
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

SOURCE = Path(__file__).with_suffix(".c")
HUGE_PAGE = 2 << 20
WORD_BYTES = 4
"""What a linear multiplies at a time: one float32, or two inputs of a token in bfloat16."""
COMPILE_TIMEOUT_S = 60.0
"""Of `CpuKernels.sample`."""
PAUSE_SOFTLY = 1
"""OpenMP's `omp_pause_soft`: its settings stay."""
NOT_FINITE = -1
"""What `CpuKernels.sample` gives where it has no token."""
_logger = logging.getLogger(__name__)


class CpuKernels:
    """A compiled library. Tensors are of its type on the CPU; whoever calls sees to shapes and strides."""

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
        self._residual = library.kraken_residual
        self._residual.argtypes = [*[pointer] * 7, *[count] * 3, ctypes.c_float, *[flag] * 3]
        self._residual.restype = None
        self._attend_many, self._sample = library.kraken_attend_many, library.kraken_sample
        self._attend_many.argtypes = [
            *[pointer, count, count, pointer, pointer, count, pointer],
            *[*[count] * 5, ctypes.c_float, pointer, flag],
        ]
        self._sample.argtypes = [pointer, *[count] * 3, *[pointer] * 6, flag]
        self.panel: int = library.kraken_panel()
        """Outputs of a linear that lie side by side in `packed_weights`."""
        self._word = WORD_BYTES // dtype.itemsize
        # of the OpenMP that this is linked to, which is torch's where that has one of the same kind
        self._pause_threads: Any = getattr(library, "omp_pause_resource_all", None)

    def release_threads(self) -> None:
        """End the threads that OpenMP keeps for the calling thread; they are back when it computes again.

        Every thread that computes has its own. Where a process has more of them than cores, none waits a moment for
        more work before it sleeps, and to wake it takes longer than many a product: whoever loads a model and leaves
        its threads behind makes another thread decode at half the speed.
        """
        if self._pause_threads is not None:
            self._pause_threads(PAUSE_SOFTLY)

    def can_compute(self, num_inputs: int) -> bool:
        """Whether so many inputs of a linear are whole words."""
        return num_inputs % self._word == 0

    def packed_weights(self, weight_WOI: Tensor) -> Tensor:
        """Weights in the order in which they are read: [W, panels, I / word, outputs of a panel, word]."""
        num_ways, num_outputs, num_inputs = weight_WOI.shape
        num_panels, whole = -(-num_outputs // self.panel), num_outputs // self.panel
        packed_weights = zeros_in_huge_pages(
            (num_ways, num_panels, num_inputs // self._word, self.panel, self._word), self.dtype
        )
        words = weight_WOI.unflatten(2, (-1, self._word)).transpose(1, 2)
        packed_weights[:, :whole] = words[:, :, : whole * self.panel].unflatten(2, (whole, self.panel)).transpose(1, 2)
        if whole < num_panels:
            packed_weights[:, whole, :, : num_outputs - whole * self.panel] = words[:, :, whole * self.panel :]
        return packed_weights

    def linear(self, x_WTI: Tensor, packed_weights: Tensor, bias_WO: Tensor | None, y_WTO: Tensor, gelu: bool) -> None:
        """Write y = x W^T + bias of every way, then GELU (tanh) if asked; all contiguous.

        Args:
            bias_WO: float32.
            y_WTO: float32, or of the library's type.
        """
        failed = self._linear(
            x_WTI.data_ptr(),
            packed_weights.data_ptr(),
            None if bias_WO is None else bias_WO.data_ptr(),
            y_WTO.data_ptr(),
            *x_WTI.shape[:2],
            x_WTI.shape[2] // self._word,
            y_WTO.shape[2],
            y_WTO.dtype == torch.float32,
            gelu,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for a linear of {x_WTI.shape[1]} tokens and {x_WTI.shape[2]} inputs")

    def residual(
        self,
        x_WTD: Tensor,
        addend_WTD: Tensor,
        gain_WD: Tensor | None,
        bias_WD: Tensor | None,
        epsilon: float,
        part_1TD: Tensor | None = None,
        sees: bool = False,
        is_total: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """x + addend, and with a gain the LayerNorm of that and of what it sees; as `kraken.engine.model.residual`
        says."""
        given = (x_WTD, addend_WTD, part_1TD, gain_WD, bias_WD)
        held = [None if tensor is None else tensor.contiguous() for tensor in given]
        a_WTD = x_WTD.new_empty(x_WTD.shape)
        normed_WTD = None if gain_WD is None else x_WTD.new_empty(x_WTD.shape)
        self._residual(
            *(None if tensor is None else tensor.data_ptr() for tensor in (*held, a_WTD, normed_WTD)),
            *x_WTD.shape,
            epsilon,
            sees,
            is_total,
            torch.get_num_threads(),
        )
        return a_WTD, normed_WTD

    def store(self, k_TNH: Tensor, v_TNH: Tensor, keys_NSH: Tensor, values_NSH: Tensor, slots_T: Tensor) -> None:
        """Write keys and values to their slots; k and v have equal strides and the last dimension whole."""
        token_stride, head_stride, _ = k_TNH.stride()
        self._store(
            k_TNH.data_ptr(),
            v_TNH.data_ptr(),
            token_stride,
            head_stride,
            keys_NSH.data_ptr(),
            values_NSH.data_ptr(),
            keys_NSH.shape[1],
            slots_T.data_ptr(),
            *k_TNH.shape,
        )

    def attend(
        self,
        q_TNH: Tensor,
        keys_NSH: Tensor,
        values_NSH: Tensor,
        rows_B: Tensor,
        tables_BM: Tensor,
        lengths_B: Tensor,
        tokens_per_block: int,
        out_TNH: Tensor,
    ) -> None:
        """Write the attention of one token of each of B sequences, whose key and value are stored already.

        Args:
            rows_B: int64, the tokens' places among T.
            tables_BM: int32, each sequence's blocks.
            lengths_B: int64, how many keys each sees.
        """
        token_stride, head_stride, _ = q_TNH.stride()
        _, num_heads, head_size = q_TNH.shape
        self._attend(
            q_TNH.data_ptr(),
            token_stride,
            head_stride,
            keys_NSH.data_ptr(),
            values_NSH.data_ptr(),
            keys_NSH.shape[1],
            rows_B.data_ptr(),
            tables_BM.data_ptr(),
            lengths_B.data_ptr(),
            tables_BM.shape[1],
            tokens_per_block,
            len(rows_B),
            num_heads,
            head_size,
            head_size**-0.5,
            out_TNH.data_ptr(),
            torch.get_num_threads(),
        )

    def attend_prompt_chunk(
        self,
        q_TNH: Tensor,
        keys_NSH: Tensor,
        values_NSH: Tensor,
        blocks_M: Tensor,
        start: int,
        tokens_per_block: int,
        out_TNH: Tensor,
    ) -> None:
        """Write the attention of neighbouring tokens of one sequence, whose keys and values are stored already.

        Args:
            blocks_M: int32, the sequence's blocks.
            start: position of the first of the tokens.
            out_TNH: contiguous.
        """
        token_stride, head_stride, _ = q_TNH.stride()
        num_tokens, num_heads, head_size = q_TNH.shape
        failed = self._attend_many(
            q_TNH.data_ptr(),
            token_stride,
            head_stride,
            keys_NSH.data_ptr(),
            values_NSH.data_ptr(),
            keys_NSH.shape[1],
            blocks_M.data_ptr(),
            tokens_per_block,
            start,
            num_tokens,
            num_heads,
            head_size,
            head_size**-0.5,
            out_TNH.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for the attention of {num_tokens} tokens from position {start}")

    def sample(
        self,
        logits_BV: Tensor,
        top_k_B: Tensor,
        temperature_B: Tensor,
        top_p_B: Tensor,
        min_p_B: Tensor,
        uniform_B: Tensor,
    ) -> Tensor:
        """The next token of every row, int64, by its `SamplingParams`; `NOT_FINITE` where the logits are none. Of equal
        ones the lowest ids stay.

        Args:
            logits_BV: float32, whatever the library's type; ids side by side.
            top_k_B: int64.
            temperature_B, top_p_B, min_p_B: float32.
            uniform_B: float64, what each token is drawn by.
        """
        chosen_B = torch.empty(len(logits_BV), dtype=torch.int64)
        failed = self._sample(
            logits_BV.data_ptr(),
            logits_BV.stride(0),
            *logits_BV.shape,
            top_k_B.data_ptr(),
            temperature_B.data_ptr(),
            top_p_B.data_ptr(),
            min_p_B.data_ptr(),
            uniform_B.data_ptr(),
            chosen_B.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory to draw from {logits_BV.shape[1]} ids")
        return chosen_B


@functools.cache
def cpu_kernels(device: torch.device, dtype: torch.dtype) -> CpuKernels | None:
    """The kernels for tensors of a type, compiled once per process; None where that cannot be done here, for devices
    other than the CPU, and of types other than float32 and bfloat16."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return None
    compiler = next(
        (found for name in (os.environ.get("CC"), "cc", "gcc") if name and (found := shutil.which(name))), None
    )
    if compiler is None:
        _logger.info("no C compiler found: the engine computes with torch's operators")
        return None
    tuning = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    with tempfile.TemporaryDirectory(prefix="kraken-kernels-") as folder:
        library = Path(folder) / "cpu_kernels.so"
        options = ["-O3", tuning, "-fopenmp", "-shared", "-fPIC", *(["-DBFLOAT16"] if dtype == torch.bfloat16 else [])]
        command = [compiler, *options, str(SOURCE), "-o", str(library), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
            return CpuKernels(library, dtype)
        except (OSError, subprocess.SubprocessError) as error:
            reason = str(getattr(error, "stderr", None) or error).strip()
            _logger.info("the engine computes with torch's operators, since %s failed: %s", compiler, reason)
            return None


def zeros_in_huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in pages of 2 MB, where the system has them: memory is read a fifth faster than in small ones."""
    num_values = torch.Size(shape).numel()
    num_pages = -(-num_values * dtype.itemsize // HUGE_PAGE)
    if num_values * dtype.itemsize < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    pages = mmap.mmap(-1, num_pages * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=num_values).view(shape)
