"""Which tensors a TensorRT-LLM folder holds, and how each is made of one of the exchange folder.

A head of size H becomes one of the padded size P: rows of zeros are added to its queries, keys and values, and columns
of zeros to the output projection. Products of queries and keys stay what they are, but kernels divide them by sqrt(P);
so the queries' weights and biases are multiplied by sqrt(P/H), in float32. `kraken/trtllm/proof.py` shows that the
logits are the same. Shape letters as in `kraken/model/architecture.py`; none of this needs TensorRT-LLM.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kraken.config import VOCAB_MULTIPLE, ConfigError, ModelConfig
from kraken.convert import exchange_shapes
from kraken.plan.cost import FULL_PADDING

BLOCK_BYTES = 2**21
"""What is read, padded and handed on at once."""

SHARED_NAMES = {
    "transformer.wte": "embed_tokens",
    "transformer.wpe": "embed_positions",
    "transformer.conjunction": "conjunction",
    "transformer.ln_f": "ln_f",
}
LAYER_NAMES = {
    "ln_1": "ln_1",
    "ln_2": "ln_2",
    "attn.c_attn": "attn.",  # q, k and v follow
    "attn.c_proj": "attn.o",
    "mlp.c_fc": "mlp.fc",
    "mlp.c_proj": "mlp.proj",
}
"""Exchange name of a module -> its name here."""

ReadRows = Callable[[str, int, int], Tensor]
"""(exchange name, first row, row past the last) -> these rows, in any type."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One tensor of the folder, and how it is made of one of the exchange folder."""

    name: str
    shape: tuple[int, ...]
    source: str
    """Exchange name."""
    first_row: int
    num_rows: int
    """Rows that are taken of the source."""
    head_size: int
    padded_head_size: int
    pads_rows: bool = False
    """Whether every `head_size` rows are padded to `padded_head_size`; `pads_columns` likewise."""
    pads_columns: bool = False
    scale: float = 1.0

    @property
    def way(self) -> int | None:
        """The way that it belongs to, and so the rank; None for what all ranks share."""
        return int(self.name.split(".")[1]) if self.name.startswith("ways.") else None

    def num_bytes(self, dtype: torch.dtype) -> int:
        return math.prod(self.shape) * dtype.itemsize

    def blocks(self, read: ReadRows, dtype: torch.dtype) -> Iterator[Tensor]:
        """The tensor in pieces of about `BLOCK_BYTES`, from its first row on."""
        unit = self.head_size if self.pads_rows else 1
        row_bytes = 4 * math.prod(self.shape[1:])
        step = max(1, BLOCK_BYTES // (unit * row_bytes)) * unit
        num_written = 0
        for start in range(0, self.num_rows, step):
            rows = read(self.source, self.first_row + start, self.first_row + min(start + step, self.num_rows))
            if self.scale != 1.0:
                rows = rows.float() * self.scale
            if self.pads_rows:
                rows = self._padded(rows, 0)
            if self.pads_columns:
                rows = self._padded(rows, 1)
            num_written += len(rows)
            yield rows.to(dtype)
        if num_written < self.shape[0]:  # the padding of the vocabulary
            yield torch.zeros(self.shape[0] - num_written, *self.shape[1:], dtype=dtype)

    def _padded(self, rows: Tensor, dim: int) -> Tensor:
        """Zeros after the channels of every head along a dimension."""
        heads = rows.unflatten(dim, (-1, self.head_size))
        after = heads.dim() - dim - 2  # dimensions behind the channels
        return F.pad(heads, [0, 0] * after + [0, self.padded_head_size - self.head_size]).flatten(dim, dim + 1)


def padded_head_size(config: ModelConfig) -> int:
    """The smallest head size that has both kernels of TensorRT-LLM.

    Raises:
        ConfigError: heads are larger than any kernel's.
    """
    size = FULL_PADDING.head_size(config.head_size)
    if size is None:
        raise ConfigError(
            f"the head size is {config.head_size} (model.width={config.width} / {config.heads_per_way} heads of a "
            f"way), and TensorRT-LLM has no kernel above {FULL_PADDING.head_sizes[-1]}; choose more model.num_heads, "
            "or serve this model with engine.kind=torch"
        )
    return size


def padded_vocab_size(config: ModelConfig) -> int:
    """V, rounded up so that W ranks share it evenly in multiples of 64."""
    multiple = math.lcm(VOCAB_MULTIPLE, config.num_ways)
    return -(-config.vocab_size // multiple) * multiple


def require_convertible(config: ModelConfig) -> None:
    """Raises:
    ConfigError: the model inside TensorRT-LLM cannot compute this shape.
    """
    if config.architecture == "kraken_delayed":
        raise ConfigError(
            "model.architecture=kraken_delayed is not supported with TensorRT-LLM; choose model.architecture=kraken, "
            "or serve this model with engine.kind=torch"
        )
    if config.positions != "learned":
        raise ConfigError(
            f"model.positions={config.positions} is not supported with TensorRT-LLM; choose model.positions=learned, "
            "or serve this model with engine.kind=torch"
        )
    padded_head_size(config)


def plan_parts(config: ModelConfig) -> list[Part]:
    """Every tensor of the folder, way after way and what they share last; allocates nothing.

    Raises:
        ConfigError: the shape cannot be converted.
    """
    require_convertible(config)
    parts = [part for name, shape in exchange_shapes(config).items() for part in _parts_of(name, shape, config)]
    return sorted(parts, key=lambda part: config.num_ways if part.way is None else part.way)


def _parts_of(source: str, shape: tuple[int, ...], config: ModelConfig) -> list[Part]:
    """What becomes of one tensor of the exchange folder."""
    true, padded = config.head_size, padded_head_size(config)
    inner = config.heads_per_way * padded
    common: dict[str, Any] = {"source": source, "head_size": true, "padded_head_size": padded}
    module, _, kind = source.rpartition(".")
    whole: dict[str, Any] = {"first_row": 0, "num_rows": shape[0]}
    if module in SHARED_NAMES:
        num_rows = padded_vocab_size(config) if module == "transformer.wte" else shape[0]
        return [Part(name=f"{SHARED_NAMES[module]}.{kind}", shape=(num_rows, *shape[1:]), **whole, **common)]
    match = re.fullmatch(r"transformer\.h\.(\d+)\.(\d+)\.(.+)", module)
    assert match is not None, f"{source} has no place in a TensorRT-LLM folder"
    way, layer, rest = match.groups()
    name = f"ways.{way}.layers.{layer}.{LAYER_NAMES[rest]}"
    if rest == "attn.c_attn":
        D = config.width
        return [
            Part(
                name=f"{name}{letter}.{kind}",
                shape=(inner, *shape[1:]),
                first_row=index * D,
                num_rows=D,
                pads_rows=True,
                scale=math.sqrt(padded / true) if letter == "q" else 1.0,
                **common,
            )
            for index, letter in enumerate("qkv")
        ]
    pads_columns = rest == "attn.c_proj" and kind == "weight"
    found = (shape[0], inner) if pads_columns else tuple(shape)
    return [Part(name=f"{name}.{kind}", shape=found, pads_columns=pads_columns, **whole, **common)]


def padded_tensors(config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The folder's tensors in memory, of an exchange folder's in memory: for models that are small."""
    return {
        part.name: torch.cat(list(part.blocks(lambda name, start, end: tensors[name][start:end], dtype)))
        for part in plan_parts(config)
    }
