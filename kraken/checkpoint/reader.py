"""Checkpoints: weights, optimizer state, position and history, in files that any mesh of processes can read.

Every rank writes what it holds, as pieces of whole tensors (`pieces.py`) in safetensors of its own; what several ranks
hold is written by one of them. A reader asks for the pieces that it holds on its own mesh and takes them out of
whatever files they lie in, so that resharding is nothing but reading, and nobody holds more than its part. (torch's
distributed checkpoint does the same with pickled metadata, or needs every tensor as a DTensor, which the ways are not.)

    step_000000100/
      model_00000_of_00002.safetensors        the pieces of rank 0 of 2, their places in the header
      optimizer_00000_of_00002.safetensors    moments, and on rank 0 how many updates were skipped
      ...                                     the same of rank 1
      history.jsonl  manifest.json            all hashes; written when every rank's files are on disk

The folder has another name until its manifest is there: a checkpoint is whole, or not there at all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from kraken.checkpoint.folders import STEP_FOLDER as STEP_FOLDER
from kraken.checkpoint.folders import list_checkpoints as list_checkpoints
from kraken.checkpoint.folders import newest_checkpoint as newest_checkpoint
from kraken.checkpoint.folders import step_folder as step_folder
from kraken.checkpoint.folders import step_of as step_of
from kraken.checkpoint.history import History, read_history
from kraken.checkpoint.pieces import Piece, Slices, whole_piece
from kraken.checkpoint.tensor_files import read_pieces
from kraken.config import ModelConfig, from_dict, to_dict
from kraken.manifest import ArtefactError, Manifest, sha256_of_file
from kraken.model.architecture import Kraken, whole_shapes
from kraken.tokenizer import require_same_tokenizer

KINDS = ("model", "optimizer")
PROGRESS = "progress"
"""Name of the tensor of `TrainingStep.progress`, among the optimizer's."""


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor as a rank holds it, and which piece of the whole that is."""

    tensor: Tensor
    piece: Piece


State = Mapping[str, Mapping[str, Held]]
"""What a checkpoint holds of a rank: kind ("model", "optimizer") -> name -> what is held."""


class CheckpointReader:
    """A finished checkpoint, open for reading.

    Raises:
        ArtefactError: it is damaged, as far as its manifest and the files' headers show.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self.step = int(self.manifest.value("step"))
        self._pieces = {
            kind: {
                record.path: read_pieces(folder / record.path)
                for record in self.manifest.files
                if record.path.startswith(f"{kind}_")
            }
            for kind in KINDS
        }

    def verify(self, wanted: State) -> None:
        """Compare the hashes of the files that hold something of what is wanted, and of the history.

        Raises:
            ArtefactError: names the first file that differs.
        """
        for record in self.manifest.files:
            kind = record.path.partition("_")[0]
            pieces = self._pieces.get(kind, {}).get(record.path)
            if pieces is not None and not any(
                held.piece.overlap(pieces[name]) for name, held in wanted.get(kind, {}).items() if name in pieces
            ):
                continue
            if sha256_of_file(self.folder / record.path) != record.sha256:
                raise ArtefactError(f"{self.folder / record.path} does not match its hash")

    def require_fitting(self, config: ModelConfig, *, data_fingerprint: str, tokenizer_fingerprint: str) -> None:
        """Raises:
        ArtefactError: it belongs to another model, other data or another tokenizer.
        """
        manifest = self.manifest
        _require_equal(self.folder, "model shape", manifest.config, to_dict(config))
        _require_equal(self.folder, "data", manifest.parents["prepare"], data_fingerprint)
        require_same_tokenizer(
            manifest.details["tokenizer_fingerprint"], tokenizer_fingerprint, str(self.folder), "the data"
        )

    @torch.no_grad()
    def read(self, kind: str, wanted: Mapping[str, Held]) -> None:
        """Fill the tensors with their pieces, whichever files hold them.

        Raises:
            ArtefactError: the checkpoint lacks some of them, has them in another shape, or has others besides.
        """
        hint = "was it written with other settings, such as train.optimizer? Choose another run"
        sources: dict[str, list[tuple[str, Slices, Slices]]] = {name: [] for name in wanted}
        num_missing = {name: held.piece.num_elements for name, held in wanted.items()}
        for path, pieces in self._pieces[kind].items():
            if unexpected := sorted(pieces.keys() - wanted.keys()):
                raise ArtefactError(f"{self.folder} does not fit the {kind}: unexpected {unexpected[:3]}; {hint}")
            for name, piece in pieces.items():
                held = wanted[name]
                if piece.whole != held.piece.whole:
                    raise ArtefactError(
                        f"{self.folder}: {name} is {list(piece.whole)}, the {kind}'s is {list(held.piece.whole)}"
                    )
                if (common := held.piece.overlap(piece)) is not None:
                    sources[name].append((path, *common))
                    num_missing[name] -= held.tensor[common[0]].numel()
        if missing := sorted(name for name, count in num_missing.items() if count):
            raise ArtefactError(f"{self.folder} does not fit the {kind}: missing {missing[:3]}; {hint}")
        for path in self._pieces[kind]:
            with safetensors.safe_open(self.folder / path, framework="pt") as file:
                for name, places in sources.items():
                    for source, mine, theirs in places:
                        if source == path:
                            part = file.get_slice(name)[theirs] if theirs else file.get_tensor(name)
                            wanted[name].tensor[mine] = part.to(wanted[name].tensor.device)

    def read_history(self) -> History:
        """The reports until then."""
        return read_history(self.folder)

    def dtype(self) -> torch.dtype:
        """The type that the weights were written in."""
        for path, pieces in self._pieces["model"].items():
            for name in pieces:
                with safetensors.safe_open(self.folder / path, framework="pt") as file:
                    dtype: torch.dtype = file.get_slice(name)[:0].dtype
                    return dtype
        raise ArtefactError(f"{self.folder} holds no weights; delete it")


def load_model(folder: Path) -> tuple[Kraken, Manifest]:
    """The whole model of a checkpoint, in the type it was written in, on the CPU.

    Raises:
        ArtefactError: the checkpoint is unfinished, damaged or not of this model.
    """
    reader = CheckpointReader(folder)
    model = Kraken(from_dict(ModelConfig, reader.manifest.config)).to(reader.dtype())
    shapes = whole_shapes(model.config)
    reader.read("model", {name: Held(p.detach(), whole_piece(shapes[name])) for name, p in model.named_parameters()})
    return model, reader.manifest


def _require_equal(folder: Path, what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise ArtefactError(
            f"{folder} was written for another {what}: {found} instead of {expected}; choose another run"
        )
