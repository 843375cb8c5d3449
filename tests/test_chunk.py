"""What a forward pass is told and answers, and which steps are recorded as CUDA graphs."""

import dataclasses

import pytest
import torch

from kraken.config import ConfigError, EngineConfig
from kraken.engine.batch import ForwardOutput, GraphSizes, sizes_up_to


@pytest.mark.parametrize("most", [1, 2, 3, 4, 16, 31, 100, 2048])
def test_sizes_reach_the_largest_and_waste_little(most: int) -> None:
    sizes = sizes_up_to(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most
    for num_tokens in range(16, most + 1):
        assert min(size for size in sizes if size >= num_tokens) <= 1.25 * num_tokens


def test_sizes_can_be_chosen() -> None:
    sizes = GraphSizes(max_batch_size=8, max_prompt_tokens=512, max_blocks=4)
    assert sizes.batch_sizes == [1, 2, 4, 8]
    assert sizes.prompt_lengths[0] == 16 and sizes.prompt_lengths[-1] == 512
    chosen = dataclasses.replace(sizes, chosen=(512, 1, 8, 128, 2048, 8))
    assert chosen.batch_sizes == [1, 8]
    assert chosen.prompt_lengths == [1, 8, 128, 512]
    assert dataclasses.replace(sizes, chosen=(100,)).batch_sizes == []  # every batch is computed kernel by kernel


@pytest.mark.parametrize("config", [{"cuda_graph_sizes": (0, 1)}, {"cuda_graph_sizes": (8,), "cuda_graphs": False}])
def test_sizes_that_cannot_be_are_refused(config: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"engine.cuda_graph_sizes=\(.*leave it out"):
        EngineConfig(**config)  # type: ignore[arg-type]


def test_what_a_pass_is_still_drawing_is_not_copied() -> None:
    forward_output = ForwardOutput(torch.arange(6.0).view(3, 2), torch.zeros(3, dtype=torch.int64))
    assert forward_output.of([0, 1, 2]) is forward_output
    some = forward_output.of([0, 2])
    assert some.logits_RV.tolist() == [[0.0, 1.0], [4.0, 5.0]] and some.next_ids_R is None
