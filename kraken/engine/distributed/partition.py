"""The part of a model that each of several devices computes, and the weights of that part.

Kraken's ways are divided: a device computes some ways whole. The baselines have one way, divided by ordinary tensor
parallelism: each device has some heads and some columns of the FFN, and the linears that follow give partial sums
(Shoeybi et al., "Megatron-LM", 2019). Every device holds the whole token embedding, so that the first layer waits for
no other device, and computes the logits of some ids.

Shape letters as in `kraken/model/architecture.py`.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kraken.config import ConfigError, ModelConfig
from kraken.convert import exchange_names, has_ways, read_tensors
from kraken.model.architecture import INIT_STD, Kraken, is_vector, whole_shapes

Weights = dict[str, Tensor]
"""Name as in `kraken/model/architecture.py` -> one device's part of that parameter."""


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a model that one of `size` devices computes; the default is all of it.

    Raises:
        ConfigError: the model cannot be divided so.
    """

    config: ModelConfig
    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        c = self.config
        if c.is_kraken:
            divided = {"ways": c.num_ways}
        else:
            divided = {"heads": c.num_heads, "FFN columns": c.ffn_size}
        for what, count in divided.items():
            if count % self.size:
                choices = [n for n in range(1, count + 1) if all(number % n == 0 for number in divided.values())]
                raise ConfigError(
                    f"engine.num_devices={self.size} does not divide the {count} {what} of this {c.architecture} model;"
                    f" choose from {choices[:16]}"
                )

    @property
    def is_tensor_parallel(self) -> bool:
        """Whether the outputs of attention and FFN are partial sums."""
        return self.size > 1 and not self.config.is_kraken

    @property
    def ways(self) -> range:
        """The ways of this device."""
        return range(1) if self.is_tensor_parallel else self._share(self.config.num_ways)

    @property
    def heads_per_way(self) -> int:
        """Heads of this device, in each of its ways."""
        return self.config.heads_per_way // (self.size if self.is_tensor_parallel else 1)

    def head_rows(self, num_ids: int) -> range:
        """Ids whose logits this device computes: equally many on every device; some may be beyond `num_ids`."""
        each = -(-num_ids // self.size)
        return range(self.rank * each, (self.rank + 1) * each)

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """This device's part of a parameter."""
        if self.size == 1:
            return whole
        if name == "conjunction.weight":
            columns = whole.unflatten(1, (self.config.num_ways, -1))
            return columns[:, self.ways.start : self.ways.stop].flatten(1)
        if not has_ways(name):
            return whole
        if not self.is_tensor_parallel:
            return whole[self.ways.start : self.ways.stop]
        heads, hidden = self._share(self.config.num_heads), self._share(self.config.ffn_size)
        match name.split(".", 2)[2]:
            case "attn.c_attn.weight" | "attn.c_attn.bias":
                rows = whole.unflatten(1, (3, self.config.num_heads, self.config.head_size))
                return rows[:, :, heads.start : heads.stop].flatten(1, 3)
            case "attn.c_proj.weight":
                columns = whole.unflatten(2, (self.config.num_heads, self.config.head_size))
                return columns[:, :, heads.start : heads.stop].flatten(2)
            case "mlp.c_fc.weight" | "mlp.c_fc.bias":  # one matrix, or the gate and the matrix that it gates
                rows = whole.unflatten(1, (-1, self.config.ffn_size))
                return rows[:, :, hidden.start : hidden.stop].flatten(1, 2)
            case "mlp.c_proj.weight":
                return whole[:, :, hidden.start : hidden.stop]
        return whole  # gains, and biases that rank 0 adds to the sum

    def _share(self, count: int) -> range:
        each = count // self.size
        return range(self.rank * each, (self.rank + 1) * each)


def weights_of(model: Kraken, part: Part) -> Weights:
    """The weights of a part of a model in memory; views where that is possible."""
    return {name: part.cut(name, parameter.detach()) for name, parameter in model.named_parameters()}


def shapes_of(part: Part) -> dict[str, torch.Size]:
    """Name -> shape of every weight of a part."""
    shapes = whole_shapes(part.config)
    return {name: part.cut(name, torch.empty(shape, device="meta")).shape for name, shape in shapes.items()}


def empty_weights(part: Part, dtype: torch.dtype, device: torch.device) -> Weights:
    """Uninitialised weights of a part."""
    return {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes_of(part).items()}


def random_weights(part: Part, dtype: torch.dtype, device: torch.device) -> Weights:
    """Random weights for measuring time. Weights that all devices hold differ between devices."""
    weights = empty_weights(part, dtype, device)
    for name, weight in weights.items():
        if is_vector(name):
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            weight.normal_(std=INIT_STD)
    return weights


def read_weights(folder: Path, part: Part, dtype: torch.dtype, device: torch.device) -> Weights:
    """Read the weights of a part from an exchange folder, one parameter at a time, without other devices' ways.

    Raises:
        ArtefactError: files, names or shapes do not fit the model.
    """
    weights = empty_weights(part, dtype, device)
    places: dict[str, tuple[str, int | None]] = {}
    for name in weights:
        names = exchange_names(name, part.config.num_ways)
        if has_ways(name):
            places |= {names[way]: (name, index) for index, way in enumerate(part.ways)}
        else:
            places[names[0]] = (name, None)
    for exchange_name, whole in read_tensors(folder, part.config, places.keys()):
        name, index = places[exchange_name]
        if index is None:
            weights[name].copy_(part.cut(name, whole))
        elif part.is_tensor_parallel:
            weights[name].copy_(part.cut(name, whole[None]))
        else:
            weights[name][index].copy_(whole)
    return weights
