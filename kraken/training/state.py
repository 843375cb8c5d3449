"""The state of training as a checkpoint sees it: what a rank holds of it, and what of that it writes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kraken.checkpoint.pieces import held_piece, whole_piece
from kraken.checkpoint.reader import PROGRESS, CheckpointReader, Held, State
from kraken.model.architecture import way_dimension, whole_shapes
from kraken.training.parallel import Mesh, local
from kraken.training.step import TrainingStep


class TrainingState:
    """Weights, moments and progress of a training step, with their places in the whole."""

    def __init__(self, step: TrainingStep, mesh: Mesh):
        self._step, self._mesh = step, mesh
        self._shapes = whole_shapes(step.model.config)

    def to_write(self) -> State:
        """This rank's part of a checkpoint, once a step was taken; what several ranks hold, they write in turns."""
        return {
            kind: {
                name: held
                for index, (name, held) in enumerate(part.items())
                if self._writes(index, kind, name) and held.piece.num_elements
            }
            for kind, part in self._held(self._step.optimizer.state()).items()
        }

    def _writes(self, index: int, kind: str, name: str) -> bool:
        """Whether this rank is the one to write a tensor, of those that hold the same of it."""
        mesh = self._mesh
        if name == PROGRESS:
            return mesh.is_main
        holder, num_holders = mesh.axis_rank("replicate"), mesh.axis_size("replicate")
        if way_dimension(parameter_name(kind, name)) is None:
            holder = holder * mesh.axis_size("way") + mesh.axis_rank("way")
            num_holders *= mesh.axis_size("way")
        return index % num_holders == holder

    def to_read(self) -> "WantedState":
        """What this rank needs of a checkpoint, before any step."""
        return WantedState(self._step, self._step.optimizer.empty_state(), self)

    def _held(self, moments: Mapping[str, Tensor]) -> State:
        tensors = {"model": dict(self._step.model.named_parameters()), "optimizer": moments}
        held: dict[str, dict[str, Held]] = {kind: {} for kind in tensors}
        for kind, part in tensors.items():
            for name, tensor in part.items():
                parameter = parameter_name(kind, name)
                config, ways = self._step.model.config, self._mesh.ways
                piece = held_piece(parameter, tensor, self._shapes[parameter], config, ways)
                held[kind][name] = Held(local(tensor).detach(), piece)
        progress = self._step.progress
        held["optimizer"][PROGRESS] = Held(progress, whole_piece(tuple(progress.shape)))
        return held


class WantedState:
    """The places that a checkpoint has to fill.

    Args:
        moments: the optimizer's, empty.
    """

    def __init__(self, step: TrainingStep, moments: Mapping[str, Tensor], state: TrainingState):
        self._step, self._moments = step, moments
        self.places = state._held(moments)

    @torch.no_grad()
    def read(self, checkpoint: CheckpointReader) -> None:
        """Continue from a checkpoint, of whatever mesh.

        Raises:
            ArtefactError: it does not fit the model or the optimizer.
        """
        for kind, part in self.places.items():
            checkpoint.read(kind, part)
        num_skipped = int(self._step.progress[1])
        self._step.optimizer.load_state(self._moments, checkpoint.step - num_skipped)


def parameter_name(kind: str, name: str) -> str:
    """The parameter that a tensor of a checkpoint is, or is a moment of."""
    return name if kind == "model" else name.partition(".")[2]
