"""The batch of a step, the output of a forward pass, and which steps are captured as CUDA graphs."""

import dataclasses

import pytest
import torch

from kraken.config import ConfigError, EngineConfig
from kraken.engine.batch import ForwardOutput, GraphSizes, StepBatch, sizes_up_to


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


def test_sampled_ids_of_a_graph_that_is_still_running_are_not_copied() -> None:
    output = ForwardOutput(torch.arange(6.0).view(3, 2), torch.zeros(3, dtype=torch.int64))
    assert output.select([0, 1, 2]) is output
    some = output.select([0, 2])
    assert some.logits_RV.tolist() == [[0.0, 1.0], [4.0, 5.0]] and some.next_ids_R is None


def test_a_batch_maps_tokens_to_slots_and_rows() -> None:
    batch = StepBatch.concatenate([[5, 6, 7], [8]], [0, 5], [[2, 0], [3, 1, 4]], [0, 1], 2)
    assert len(batch) == 2 and not batch.is_decode
    assert batch.token_ids_T.tolist() == [5, 6, 7, 8] and batch.positions().tolist() == [0, 1, 2, 5]
    assert batch.slot_mapping().tolist() == [4, 5, 0, 9]
    assert (batch.ends, batch.logit_rows()) == ([3, 4], [3])
    assert StepBatch.concatenate([[1], [2]], [4, 0], [[0, 1, 2], [3]], [1, 1], 2).is_decode


def test_a_batch_is_sent_to_other_ranks_as_it_is() -> None:
    batch = StepBatch.concatenate([[5, 6, 7], [8], []], [0, 41, 0], [[2, 9], [1], [0]], [0, 1, 0], 16)
    found = StepBatch.from_bytes(batch.to_bytes())
    assert found.token_ids_T.tolist() == batch.token_ids_T.tolist()
    assert [list(blocks) for blocks in found.block_tables] == batch.block_tables
    for name in ("first_positions", "num_tokens", "num_logits", "tokens_per_block"):
        assert getattr(found, name) == getattr(batch, name)
