"""What CUDA graphs record, computed without recording it, equals plain passes. Without CUDA by Triton's interpreter,
where that is installed; `tests/test_engine_gpus.py` replays them."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from test_engine_devices import DIVISIBLE, make_model
from torch import Tensor

from kraken.engine.batch import ForwardOutput, SamplingInput, StepBatch
from kraken.engine.distributed.device_group import DeviceGroup
from kraken.engine.distributed.partition import Part, weights_of
from kraken.engine.kernels.torch.kernels import TorchKernels
from kraken.engine.model.network import Network
from kraken.engine.model_runner import ModelRunner

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_IDS, PROMPT, SIZE, TOKENS_PER_BLOCK = 120, 18, 24, 4
BLOCKS = [5, 2, 9, 0, 11]


class Eager:
    """Computes what a captured graph replays, from inputs that hold what an earlier step has left."""

    def __init__(self, forward: Callable[[Tensor], Tensor], *shape: int):
        self._forward, self._values = forward, np.full(shape, 7, dtype=np.int32)

    def inputs(self) -> np.ndarray:
        return self._values

    def replay(self, num_rows: int, sampling: Sequence[SamplingInput]) -> ForwardOutput:
        return ForwardOutput(self._forward(torch.from_numpy(self._values).to(DEVICE))[:num_rows])


@pytest.mark.parametrize("variant", DIVISIBLE)
def test_a_prompt_and_a_token_equal_plain_passes(variant: str) -> None:
    from kraken.engine.cuda_graphs import CudaGraphRunner

    model = make_model(variant).to(DEVICE)
    weights = {name: weight.clone() for name, weight in weights_of(model, Part(model.config)).items()}
    network = Network(Part(model.config), weights, NUM_IDS, DeviceGroup(TorchKernels()))
    plain, graphed = (ModelRunner(network, num_blocks=16, tokens_per_block=TOKENS_PER_BLOCK) for _ in range(2))
    graphs: Any = object.__new__(CudaGraphRunner)  # no device to capture on
    graphs._network, graphs._cache, graphs._num_multiprocessors = network, graphed.cache, 132
    graphs._batch_sizes, graphs._decodes = [2], {2: Eager(graphs._decode, 2, 2 + len(BLOCKS))}
    graphs._prompt_lengths, graphs._prompts = [SIZE], {SIZE: Eager(graphs._prompt, 2 * SIZE + 1)}
    ids = torch.randint(NUM_IDS, (PROMPT + 1,), generator=torch.Generator().manual_seed(0)).tolist()

    def batch(start: int, end: int, num_logits: int = 1) -> StepBatch:
        return StepBatch.concatenate([ids[start:end]], [start], [BLOCKS], [num_logits], TOKENS_PER_BLOCK)

    with torch.inference_mode():
        for step in (batch(0, PROMPT), batch(PROMPT, PROMPT + 1)):
            expected_1V = plain.forward(step).logits_RV
            torch.testing.assert_close(graphs.run(step).logits_RV, expected_1V, rtol=0, atol=1e-5)
            # the same slots are written, and no others
            assert torch.equal(graphed.cache.keys_LNSH != 0, plain.cache.keys_LNSH != 0)
    for other in (batch(0, PROMPT, num_logits=2), batch(4, PROMPT), batch(0, PROMPT, num_logits=0)):
        assert graphs.run(other) is None
