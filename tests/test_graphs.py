"""What CUDA graphs record, computed without recording it, equals plain passes. Without CUDA by Triton's interpreter,
where that is installed; `tests/test_engine_gpus.py` replays them."""

import importlib.util

import pytest
import torch
from test_engine_devices import DIVISIBLE, make_model

from kraken.engine.batch import StepBatch
from kraken.engine.distributed.device_group import DeviceGroup
from kraken.engine.distributed.partition import Part, weights_of
from kraken.engine.kernels.torch.kernels import TorchKernels
from kraken.engine.model.network import Network
from kraken.engine.model_runner import ModelRunner

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_IDS, PROMPT, SIZE, TOKENS_PER_BLOCK = 120, 18, 24, 4
BLOCKS = [5, 2, 9, 0, 11]


@pytest.mark.parametrize("variant", DIVISIBLE)
def test_a_prompt_and_a_token_equal_plain_passes(variant: str) -> None:
    from kraken.engine.cuda_graphs import CudaGraphRunner

    model = make_model(variant).to(DEVICE)
    weights = {name: weight.clone() for name, weight in weights_of(model, Part(model.config)).items()}
    network = Network(Part(model.config), weights, NUM_IDS, DeviceGroup(TorchKernels()))
    plain, graphed = (ModelRunner(network, num_blocks=16, tokens_per_block=TOKENS_PER_BLOCK) for _ in range(2))
    graphs = object.__new__(CudaGraphRunner)  # no device to record on
    graphs._network, graphs._cache, graphs._num_multiprocessors = network, graphed.cache, 132
    ids = torch.randint(NUM_IDS, (PROMPT + 1,), generator=torch.Generator().manual_seed(0)).tolist()
    prompt_C = torch.full((2 * SIZE + 1,), 7, dtype=torch.int32, device=DEVICE)  # what another prompt left behind it
    prompt_C[:PROMPT] = torch.tensor(ids[:PROMPT])
    prompt_C[SIZE : SIZE + len(BLOCKS)] = torch.tensor(BLOCKS)
    prompt_C[-1] = PROMPT - 1
    token_BC = torch.zeros(2, 2 + len(BLOCKS), dtype=torch.int32, device=DEVICE)  # the second only fills the batch up
    token_BC[0] = torch.tensor([ids[PROMPT], PROMPT + 1, *BLOCKS])
    with torch.inference_mode():
        expected_1V = plain.forward(
            StepBatch.concatenate([ids[:PROMPT]], [0], [BLOCKS], [1], TOKENS_PER_BLOCK)
        ).logits_RV
        torch.testing.assert_close(graphs._prompt(prompt_C), expected_1V, rtol=0, atol=1e-5)
        assert torch.equal(graphed.cache.keys_LNSH != 0, plain.cache.keys_LNSH != 0)  # the same slots, and no others
        expected_1V = plain.forward(
            StepBatch.concatenate([ids[PROMPT:]], [PROMPT], [BLOCKS], [1], TOKENS_PER_BLOCK)
        ).logits_RV
        torch.testing.assert_close(graphs._decode(token_BC)[:1], expected_1V, rtol=0, atol=1e-5)
