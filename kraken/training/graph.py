"""Forward and backward of a microbatch as CUDA graphs: one launch for hundreds of kernels, so none waits for Python.

A graph is a recording with fixed addresses. Inputs are copied to where it reads them; the gradients are where the one
of a step's first microbatch writes them, and those of the other microbatches add to them.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Backward = Callable[[Tensor, Tensor, int], Tensor]
"""(inputs, targets, tokens of the step) -> the detached loss; adds its gradients to the parameters' `grad`."""

WARM_UP_RUNS = 3
"""Before a recording: compilation, choice of kernels and their workspaces must not be in it."""


class GraphedBackward:
    """A `Backward` that records itself, once for each shape and once more for what comes after a step's first.

    Args:
        model: whose gradients are written. The first microbatches of all steps have one shape.
    """

    def __init__(self, backward: Backward, model: nn.Module):
        self._backward = backward
        self._parameters = list(model.parameters())
        self._recordings: dict[tuple[torch.Size, int, bool], _Recording] = {}
        self._gradients: list[Tensor | None] = [None] * len(self._parameters)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, inputs: Tensor, targets: Tensor, num_tokens: int, is_first: bool) -> Tensor:
        """Replay; the loss is overwritten by the next call.

        Args:
            is_first: the gradients are this microbatch's alone, not added to what is there.
        """
        key = (inputs.shape, num_tokens, is_first)
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._recordings[key] = self._record(inputs, targets, num_tokens, is_first)
        recording.inputs.copy_(inputs)
        recording.targets.copy_(targets)
        recording.graph.replay()
        self._attach(self._gradients)
        return recording.loss

    def close(self) -> None:
        """Give the graphs back; waits until the device has finished them."""
        torch.cuda.synchronize()
        for recording in self._recordings.values():
            recording.graph.reset()
        self._recordings.clear()

    def _record(self, inputs: Tensor, targets: Tensor, num_tokens: int, is_first: bool) -> "_Recording":
        assert (self._gradients[0] is None) == is_first, "a step's first microbatch must always have the same shape"
        inputs, targets = inputs.clone(), targets.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                self._attach([None] * len(self._parameters))
                self._backward(inputs, targets, num_tokens)
        torch.cuda.current_stream().wait_stream(stream)
        self._attach(self._gradients)
        graph = torch.cuda.CUDAGraph()
        # other threads go on: one fetches the next batch, one may write a checkpoint
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            loss = self._backward(inputs, targets, num_tokens)
        self._gradients = [parameter.grad for parameter in self._parameters]
        return _Recording(graph, inputs, targets, loss)

    def _attach(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient


class _Recording:
    """A graph with the places that it reads and writes."""

    def __init__(self, graph: torch.cuda.CUDAGraph, inputs: Tensor, targets: Tensor, loss: Tensor):
        self.graph, self.inputs, self.targets, self.loss = graph, inputs, targets, loss
