"""Writes checkpoints in the background of the training steps; every rank writes its part.

All ranks go through the phases of a checkpoint at the same step, as they agree by control all-reduces
(`kraken/training/control_all_reduce.py`): every rank's thread copies and writes its part; when all parts are on disk,
rank 0's thread writes the manifest and gives the folder its name. A rank that cannot write ends the checkpoint for all
ranks, and the one before stays. At most one checkpoint is in progress: the next one waits for it.
"""

import dataclasses
import errno
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kraken.checkpoint.folders import (
    is_checkpoint,
    is_set_aside,
    list_checkpoints,
    list_set_aside,
    make_durable,
    reason,
    set_aside,
    set_aside_name,
    step_folder,
    step_of,
)
from kraken.checkpoint.history import HISTORY_NAME, History, write_history
from kraken.checkpoint.reader import State
from kraken.checkpoint.tensor_files import write_tensors
from kraken.manifest import (
    MANIFEST_NAME,
    ArtefactError,
    FileRecord,
    Manifest,
    Metric,
    git_revision,
    library_versions,
    sha256_of_file,
)
from kraken.stopwatch import Stopwatch
from kraken.storage import Storage, is_remote
from kraken.training.control_all_reduce import ControlAllReduce
from kraken.training.parallel import Mesh
from kraken.training.snapshot import Snapshot

KEEP_SET_ASIDE = 2
"""Newest damaged checkpoints that stay, under their other name, until training has finished."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """What a run's checkpoints say about themselves besides their contents."""

    config: dict[str, Any]
    """The model's."""
    data_fingerprint: str
    tokenizer_fingerprint: str
    origin: dict[str, Any] | None = None
    """Where a continued run began: `fingerprint` of the earlier run, `step`, and its `skipped_steps` until then."""


@dataclasses.dataclass(slots=True)
class _Flight:
    """The checkpoint under way."""

    step: int
    history: History
    interval: Mapping[str, float]
    job: Future[Any]
    is_written: bool = False
    """Whether all ranks' parts are on disk; then the job is rank 0's publishing, and nothing on the others."""


class Checkpointer:
    """A run's checkpoints on one rank. Close it, or use it as a context, to end its thread.

    Args:
        run_folder: shared by the ranks, or the cache of a remote storage on each node.
        keep: newest checkpoints that stay; keep_best: and the one with the lowest validation loss.
        on_finished: called with step and folder of every checkpoint that is finished and durable.
        storage: where the folder is a cache of a remote storage, parts and manifests are published there.
    """

    def __init__(
        self,
        run_folder: Path,
        mesh: Mesh,
        control: ControlAllReduce,
        label: Label,
        *,
        keep: int,
        keep_best: bool,
        on_finished: Callable[[int, Path], None],
        storage: Storage | None = None,
    ):
        self._run_folder, self._mesh, self._control, self._label = run_folder, mesh, control, label
        self._keep, self._keep_best, self._on_finished, self._storage = keep, keep_best, on_finished, storage
        self.num_failed = 0
        self.waiting = Stopwatch()
        """Runs while this rank's host stands still for a checkpoint."""
        self.snapshot_waiting = Stopwatch(mesh.device)
        """Runs while an update waits for the copies of what it changes."""
        self.snapshot = Snapshot(mesh.device, self.snapshot_waiting)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kraken-checkpoint")
        self._flight: _Flight | None = None
        self._prepare_folder()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _prepare_folder(self) -> None:
        """Delete what a killed run was writing, and find out now whether anything can be written.

        Raises:
            ArtefactError: on every rank, when one of them cannot.
        """
        probe = self._run_folder / f".writable_{self._mesh.rank}"
        failure: OSError | None = None
        try:
            for leftover in self._run_folder.glob(".step_*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)
            self._run_folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"kraken")
            probe.unlink()
        except OSError as error:
            failure = error
        (failed_rank,) = self._control.largest(self._mesh.rank + 1 if failure else 0)
        if failed_rank:
            raise ArtefactError(
                f"rank {failed_rank - 1} cannot write to {self._run_folder}, where checkpoints go"
                f"{f' ({failure})' if failure else ''}; free space there or choose another --storage"
            )

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is under way; the same on every rank."""
        return self._flight is not None

    def set_label(self, label: Label) -> None:
        """Say of the checkpoints that follow what is known only once one was read."""
        self._label = label

    def set_aside(self, step: int) -> None:
        """Rename a checkpoint that failed its checks on some rank, so that it neither counts as kept nor is read again.

        Called on every rank, each of which may have a folder of its own.
        """
        folder = step_folder(self._run_folder, step)
        has_own_cache = self._storage is not None and is_remote(self._storage.uri)
        if self._mesh.is_main or has_own_cache:
            set_aside(folder)
        if self._mesh.is_main:
            warnings.warn(
                f"{folder} is damaged and set aside as {set_aside_name(folder).name}; training goes on from the one "
                "before",
                stacklevel=2,
            )
            if self._storage is not None:
                self._storage.move_remote(folder, set_aside_name(folder))

    def delete_set_aside(self, keep: int = 0) -> None:
        """On rank 0: delete damaged checkpoints but the newest few, here and in a remote storage."""
        folders = set(list_set_aside(self._run_folder))
        if self._storage is not None:
            folders |= {path for path in self._storage.remote_folders(self._run_folder) if is_set_aside(path)}
        for folder in sorted(folders)[: len(folders) - keep]:
            warnings.warn(f"{folder}, a damaged checkpoint that was set aside, is deleted", stacklevel=2)
            self._delete(folder)

    def start(self, step: int, state: State, history: History, interval: Mapping[str, float]) -> None:
        """Begin writing what is held after so many steps; tensors may change after `snapshot.before_change`.

        Args:
            interval: what the next report will need of the steps since the last one.
        """
        self.finish()
        with self.waiting.running():
            tensors = {f"{kind}/{name}": held.tensor for kind, part in state.items() for name, held in part.items()}
            self.snapshot.begin(tensors)
            self._flight = _Flight(step, list(history), interval, self._thread.submit(self._write_part, step, state))

    def numbers(self) -> tuple[int, int]:
        """For the next control all-reduce: whether this rank is writing, and 1 + its rank if it failed."""
        flight = self._flight
        if flight is None or not flight.job.done():
            return int(flight is not None), 0
        return 0, self._mesh.rank + 1 if flight.job.exception() else 0

    def advance(self, busy: int, failed_rank: int) -> None:
        """Begin the next phase once the control all-reduce, which every rank has read, says that all ranks have
        finished this one."""
        flight = self._flight
        if flight is None or busy:
            return
        if failed_rank:
            self._give_up(flight, failed_rank - 1)
        elif flight.is_written:
            self._flight = None
            if not self._mesh.is_main:  # of a node that has a folder of its own
                shutil.rmtree(self._partial(flight.step), ignore_errors=True)
            self._on_finished(flight.step, step_folder(self._run_folder, flight.step))
        else:
            parts = self._control.gather([dataclasses.asdict(record) for record in flight.job.result()])
            records = [FileRecord(**record) for part in parts for record in part]
            flight.is_written = True
            flight.job = self._thread.submit(self._publish if self._mesh.is_main else _nothing, flight, records)

    def finish(self, must_succeed: bool = False) -> None:
        """Wait for the checkpoint in progress, if there is one. No control all-reduce may be in flight.

        Raises:
            ArtefactError: it failed, and `must_succeed` says that this is an error.
        """
        flight = self._flight
        with self.waiting.running():
            while self._flight is not None:
                failure = self._flight.job.exception()
                (failed_rank,) = self._control.largest(self._mesh.rank + 1 if failure else 0)
                self.advance(0, failed_rank)
                if failed_rank and must_succeed:
                    assert flight is not None
                    raise ArtefactError(self._explain(flight.step, failed_rank - 1, failure)) from failure

    def _explain(self, step: int, rank: int, failure: BaseException | None) -> str:
        cause = f"by rank {rank}" if failure is None else str(failure)
        if getattr(failure, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            cause = "the disk is full"
        return (
            f"checkpoint of step {step} could not be written to {self._run_folder} ({cause}); free space and run "
            "again: training continues from the checkpoint before"
        )

    def _give_up(self, flight: _Flight, failed_rank: int) -> None:
        self._flight = None
        self.num_failed += 1
        failure = flight.job.exception()
        if self._mesh.is_main or failure is not None:
            warnings.warn(self._explain(flight.step, failed_rank, failure), stacklevel=2)
        shutil.rmtree(self._partial(flight.step), ignore_errors=True)

    def _partial(self, step: int) -> Path:
        return self._run_folder / f".{step_folder(self._run_folder, step).name}.partial"

    def _write_part(self, step: int, state: State) -> list[FileRecord]:
        """In the thread: this rank's files."""
        copies = self.snapshot.copy()
        partial = self._partial(step)
        partial.mkdir(parents=True, exist_ok=True)
        records = []
        for kind, part in state.items():
            path = partial / f"{kind}_{self._mesh.rank:05d}_of_{self._mesh.size:05d}.safetensors"
            tensors = {name: copies[f"{kind}/{name}"] for name in part}
            records.append(write_tensors(path, tensors, {name: held.piece for name, held in part.items()}))
            self._upload(path, step)
        return records

    def _publish(self, flight: _Flight, records: list[FileRecord]) -> None:
        """In rank 0's thread: the manifest, the name, and the end of older checkpoints."""
        started_at = time.monotonic()
        partial, folder = self._partial(flight.step), step_folder(self._run_folder, flight.step)
        write_history(partial, flight.history)
        history = partial / HISTORY_NAME
        records.append(FileRecord(path=history.name, num_bytes=history.stat().st_size, sha256=sha256_of_file(history)))
        metrics = {"step": Metric(flight.step, "optimizer steps")}
        report = flight.history[-1] if flight.history else {}
        if report.get("step") == flight.step and "validation_loss" in report:
            metrics["validation_loss"] = Metric(report["validation_loss"], "nats/token")
        Manifest(
            kind="checkpoint",
            fingerprint=folder.name,
            config=self._label.config,
            parents={"prepare": self._label.data_fingerprint},
            metrics=metrics,
            details={
                "tokenizer_fingerprint": self._label.tokenizer_fingerprint,
                "interval": dict(flight.interval),
                **({"origin": self._label.origin} if self._label.origin else {}),
            },
            files=tuple(sorted(records, key=lambda record: record.path)),
            libraries=library_versions(),
            git_revision=git_revision(),
            seconds=round(time.monotonic() - started_at, 3),
            created_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        ).write(partial)
        for name in (HISTORY_NAME, MANIFEST_NAME):
            self._upload(partial / name, flight.step)
        shutil.rmtree(folder, ignore_errors=True)  # one of this step that was damaged since the start
        partial.rename(folder)
        make_durable(self._run_folder)
        self._prune(flight.history)

    def _prune(self, history: History) -> None:
        """Delete all but the newest good checkpoints and the best, here and in a remote storage."""
        ordered = self._good_checkpoints()
        keep = set(ordered[-self._keep :])
        losses = {int(report["step"]): report.get("validation_loss") for report in history}
        validated = [(loss, path) for path in ordered if (loss := losses.get(step_of(path))) is not None]
        if self._keep_best and validated:
            keep.add(min(validated)[1])
        for folder in ordered:
            if folder not in keep:
                self._delete(folder)
        self.delete_set_aside(KEEP_SET_ASIDE)

    def _good_checkpoints(self) -> list[Path]:
        """Checkpoints that are whole as far as their manifests and the files' sizes show, oldest first.

        The others are set aside: a name alone must not keep a place among the newest from one that can be read.
        """
        folders = set(list_checkpoints(self._run_folder))
        remote = self._storage.remote_folders(self._run_folder) if self._storage is not None else []
        folders |= {path for path in remote if is_checkpoint(path)}
        good = []
        for folder in sorted(folders):
            try:
                if folder.is_dir():
                    Manifest.read(folder)
                if self._storage is not None and folder in remote:
                    self._storage.read_manifest(folder)
                good.append(folder)
            except ArtefactError as error:
                warnings.warn(f"{reason(error)}; set aside as {set_aside_name(folder).name}", stacklevel=2)
                set_aside(folder)
                if self._storage is not None:
                    self._storage.move_remote(folder, set_aside_name(folder))
        return good

    def _delete(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        if self._storage is not None:
            self._storage.delete_remote(folder)

    def _upload(self, path: Path, step: int) -> None:
        if self._storage is not None:
            self._storage.publish_as(path, step_folder(self._run_folder, step) / path.name)


def _nothing(flight: _Flight, records: list[FileRecord]) -> None: ...
