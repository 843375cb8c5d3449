"""Sampling: each row by its own parameters, and every token from the distribution that they define."""

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch

from kraken.engine.batch import ForwardOutput, SamplingInput, uniform
from kraken.engine.kernels.choose import choose_kernels
from kraken.engine.kernels.torch.sampling import _truncate as truncated
from kraken.engine.protocol import SamplingParams
from kraken.engine.sampler import Sampler, constrain


def sample(logits_BV: torch.Tensor, inputs: list[SamplingInput]) -> list[int | None]:
    """By the kernels that an engine on this CPU takes."""
    return Sampler(choose_kernels(torch.device("cpu"), torch.float32)).sample(ForwardOutput(logits_BV), inputs)


class TestSampling:
    def test_greedy_is_the_most_likely_token(self) -> None:
        logits = torch.tensor([[0.0, 3.0, 1.0]])
        assert sample(logits, [SamplingInput(SamplingParams(temperature=0.0), 0, 0)]) == [1]

    def test_frequencies_follow_the_distribution(self) -> None:
        logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
        drawn = Counter(sample(logits.expand(4000, 4), [SamplingInput(SamplingParams(), 7, t) for t in range(4000)]))
        for token, probability in enumerate((0.5, 0.3, 0.15, 0.05)):
            assert drawn[token] / 4000 == pytest.approx(probability, abs=0.03)

    @pytest.mark.parametrize(
        ("params", "allowed"),
        [
            ({"top_k": 1}, {0}),
            ({"top_k": 2}, {0, 1}),
            ({"top_p": 0.5}, {0}),
            ({"top_p": 0.6}, {0, 1}),
            ({"top_p": 1e-9}, {0}),
            ({"min_p": 0.29}, {0, 1, 2}),
            ({"min_p": 0.5}, {0, 1}),
            ({"min_p": 0.1, "top_k": 3}, {0, 1, 2}),
        ],
    )
    def test_truncation_keeps_the_smallest_sufficient_set(self, params: dict[str, Any], allowed: set[int]) -> None:
        logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
        inputs = [SamplingInput(SamplingParams(**params), 3, t) for t in range(500)]
        assert set(sample(logits.expand(500, 4), inputs)) == allowed

    def test_temperature_sharpens(self) -> None:
        logits = torch.log(torch.tensor([0.6, 0.4])).expand(2000, 2)
        cold = Counter(sample(logits, [SamplingInput(SamplingParams(temperature=0.25), 3, t) for t in range(2000)]))
        assert cold[0] / 2000 == pytest.approx(0.6**4 / (0.6**4 + 0.4**4), abs=0.03)

    def test_each_row_has_its_own_parameters(self) -> None:
        logits = torch.zeros(3, 50)
        logits[:, 7] = 0.1
        greedy, one, other = (
            SamplingInput(SamplingParams(temperature=t), seed, 0) for t, seed in ((0.0, 1), (1.0, 1), (1.0, 2))
        )
        together = sample(logits, [greedy, one, other])
        assert together == [sample(logits[:1], [row_input])[0] for row_input in (greedy, one, other)]
        assert together[0] == 7

    def test_randomness_depends_on_seed_and_index_only(self) -> None:
        assert uniform(1, 2) == uniform(1, 2)
        assert len({uniform(s, t) for s in (0, 1, -1, 2**63 - 1) for t in range(50)}) == 200

    def test_truncation_of_a_large_vocabulary_equals_its_definition(self) -> None:
        """Flat and peaked rows, with equal logits, each against sorting everything."""
        generator = torch.Generator().manual_seed(1)
        logits = torch.randn(6, 2000, generator=generator) * torch.tensor([0.1, 0.5, 1, 2, 4, 8])[:, None]
        logits = (logits * 16).round() / 16  # ties
        for params in ({"top_p": 0.9}, {"top_k": 700, "top_p": 0.99}, {"min_p": 0.01}, {"top_k": 40}):
            sampling = SamplingParams(**params)
            kept = truncated(logits, [sampling] * 6).isfinite()
            for row in range(6):
                probabilities = torch.softmax(logits[row].double(), -1)
                order = logits[row].sort(descending=True, stable=True).indices
                expected = torch.zeros(2000, dtype=torch.bool)
                mass = 0.0
                for rank, token in enumerate(order.tolist()):
                    probability = float(probabilities[token])
                    if mass >= sampling.top_p or probability < sampling.min_p * float(probabilities.max()):
                        break
                    if sampling.top_k and rank >= sampling.top_k:
                        break
                    expected[token] = True
                    mass += probability
                assert torch.equal(kept[row], expected), (params, row)

    def test_drawing_from_candidates_equals_drawing_from_everything_that_is_kept(self) -> None:
        """Rows in one batch whose cut the candidates decide, or do not: flat ones, and equal logits at the cut."""
        generator = torch.Generator().manual_seed(4)
        logits = torch.randn(60, 2000, generator=generator) * torch.tensor([0.1, 1.0, 4.0]).repeat(20)[:, None]
        logits[30:] = (logits[30:] * 4).round() / 4  # ties
        kinds = [{"top_p": 0.9}, {"top_k": 30}, {"min_p": 0.05}, {"top_k": 600, "top_p": 0.95}, {}]
        inputs = [SamplingInput(SamplingParams(**kinds[row % 5]), row, 3) for row in range(60)]
        together = sample(logits, inputs)
        for row, row_input in enumerate(inputs):
            kept = truncated(logits[row : row + 1], [row_input.params])
            assert together[row] == sample(kept, [SamplingInput(SamplingParams(), row, 3)])[0]
            assert together[row] == sample(logits[row : row + 1], [row_input])[0]

    def test_inputs_follow_a_distribution_of_many_groups(self) -> None:
        """The token is the one at which the cumulative distribution passes the uniform number."""
        logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(2)).expand(200, 1000)
        cumulative = torch.softmax(logits[0].double(), -1).cumsum(0)
        drawn = sample(logits, [SamplingInput(SamplingParams(), 5, t) for t in range(200)])
        for index, token in enumerate(drawn):
            expected = int(torch.searchsorted(cumulative, torch.tensor(uniform(5, index)).double(), right=True))
            assert token is not None and abs(token - expected) <= 1  # the sums are of float32 here

    def test_the_repetition_penalty_acts_on_what_came_before(self) -> None:
        logits = torch.tensor([[2.0, 1.5, -1.0, -1.2]])
        penalised = SamplingParams(temperature=0.0, repetition_penalty=2.0)
        assert sample(logits, [SamplingInput(penalised, 0, 0, {0})]) == [1]
        assert sample(logits[:, 2:], [SamplingInput(penalised, 0, 0, {0})]) == [1]  # -1 becomes -2
        assert sample(logits, [SamplingInput(penalised, 0, 0)]) == [0]

    def test_biases_and_penalties_are_their_definition_row_by_row(self) -> None:
        rng = random.Random(3)
        logits_BV = 4 * torch.randn(40, 50, generator=torch.Generator().manual_seed(2))
        inputs = []
        for row in range(40):
            params = SamplingParams(
                temperature=0.0,
                logit_bias=tuple((i, rng.uniform(-100, 100)) for i in rng.sample(range(50), rng.choice((0, 0, 9)))),
                repetition_penalty=rng.choice((1.0, 1.0, 0.5, 1.7)),
                presence_penalty=rng.choice((0.0, -2.0, 1.5)),
                frequency_penalty=rng.choice((0.0, -0.5, 2.0)),
                min_tokens=rng.choice((0, 9)),
                stop_ids=(3, 4, 3),
            )
            counts = Counter(rng.choices(range(50), k=rng.choice((0, 30))))
            inputs.append(SamplingInput(params, row, 5, {*counts, 1, 2}, counts))
        before = logits_BV.clone()
        found_BV = constrain(logits_BV, inputs)
        assert torch.equal(logits_BV, before)
        num_changed = 0
        for row, own in enumerate(inputs):
            p, expected = own.params, []
            for token_id, logit in enumerate(before[row].tolist()):
                value = logit + dict(p.logit_bias).get(token_id, 0.0)
                if token_id in own.seen_ids:
                    value = value / p.repetition_penalty if value > 0 else value * p.repetition_penalty
                count = own.counts.get(token_id, 0)
                value -= p.frequency_penalty * count + p.presence_penalty * (count > 0)
                expected.append(-math.inf if token_id in (3, 4) and p.min_tokens else value)
            assert found_BV[row].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
            num_changed += expected != before[row].tolist()
        assert num_changed > 20
        plain = [SamplingInput(SamplingParams(), 0, 0, {1}, {1: 2})]
        assert constrain(logits_BV[:1], plain).data_ptr() == logits_BV.data_ptr()

    def test_stop_ids_wait_for_min_tokens(self) -> None:
        logits = torch.tensor([[3.0, 2.0, 1.0]])
        params = SamplingParams(temperature=0.0, min_tokens=2, stop_ids=(0,))
        assert [sample(logits, [SamplingInput(params, 0, index)])[0] for index in range(3)] == [1, 1, 0]

    def test_a_row_that_is_no_number_is_named_and_the_others_drawn(self) -> None:
        logits = torch.tensor([[1.0, 2.0], [math.nan, 0.0], [math.inf, 0.0]])
        assert sample(logits, [SamplingInput(SamplingParams(temperature=0.0), 0, 0)] * 3) == [1, None, None]
