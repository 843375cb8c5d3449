"""Stage 2, pretrain: Ray Train workers run `kraken.training`; checkpoints in the stage's folder, metrics in MLflow."""

import time
from pathlib import Path

from kraken.checkpoint.folders import step_folder
from kraken.config import ConfigError, RunConfig
from kraken.manifest import MANIFEST_NAME, ArtefactError, Manifest
from pipelines import lineage
from pipelines.stage import Outcome, Stage, Work


def work(work: Work) -> Outcome:
    # torch and Ray Train, seconds that a reused stage need not spend
    from kraken.data.splits import require_windows
    from pipelines.training.workers import fit

    prepare = work.parents["prepare"]
    require_windows(work.parent_folder("prepare"), prepare, work.config.model.context_length)
    record = lineage.RunRecord(
        fingerprint=work.fingerprint,
        section=lineage.section(work.config),
        prepare=prepare.fingerprint,
        data=prepare.config,
        created_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    work.storage.publish_files([record.write(work.folder)])
    details = {"tokenizer_fingerprint": prepare.details["tokenizer_fingerprint"]}
    if work.config.continue_from is not None:
        work.run.set_tags({lineage.CONTINUED_FROM_TAG: work.config.continue_from})
        details["continued_from"] = begin(work, work.config.continue_from)
    return fit(work), details


def begin(work: Work, origin: str) -> dict[str, int | str]:
    """Copy the checkpoint that the run continues from into its folder, unless it has one of its own by now.

    Returns:
        Where it began: `fingerprint` and `step` of the checkpoint, and the earlier training's `skipped_steps` by then.
    Raises:
        ArtefactError: the checkpoint is gone or damaged.
    """
    from kraken.checkpoint.adopt import adopt

    storage, folder = work.storage, work.folder
    fingerprint, step = lineage.split_origin(origin)
    assert step is not None, origin
    newest = next(lineage.checkpoints(storage, work.fingerprint), None)
    if newest is None:
        source = storage.root / lineage.KIND / fingerprint[:16]
        storage.fetch_files(storage.remote_files(step_folder(source, step)))
        record = next((r for r in lineage.read_records(storage) if r.fingerprint == fingerprint), None)
        if record is None:
            raise ArtefactError(
                f"continue_from={origin}: that training is no longer in {source}; leave --continue-from out, or choose "
                "another training"
            )
        windows = work.config.train.validation_windows
        same_windows = record.settings["train.validation_windows"] == windows
        adopt(source, step, folder, fingerprint, keep_validations=same_windows)
        storage.publish(step_folder(folder, step))
        print(f"pretrain: continues run {lineage.short(fingerprint)} at step {step}", flush=True)
        newest = next(lineage.checkpoints(storage, work.fingerprint))
    found: dict[str, int | str] = newest[1].details["origin"]
    return found


def final_checkpoint(work: Work) -> Path:
    """The checkpoint of a finished training's last step, which is its result.

    Raises:
        ArtefactError: it is damaged; an older one must not pass for it.
    """
    from kraken.checkpoint.folders import newest_checkpoint

    folder, steps = work.parent_folder("pretrain"), int(work.parents["pretrain"].value("steps"))
    newest = newest_checkpoint(folder)
    if newest is None or newest != step_folder(folder, steps):
        raise ArtefactError(
            f"{step_folder(folder, steps)}, the result of training, is damaged; delete {folder / MANIFEST_NAME} and "
            f"run pretrain again, which continues from {newest.name if newest else 'step 0'}"
        )
    return newest


def is_valid(config: RunConfig, manifest: Manifest) -> bool:
    """Whether a finished training is what a config asks for, beyond its fingerprint.

    Raises:
        ConfigError: it skipped bad steps, and the config says to stop at them; or it left no trace of a step to trace.
    """
    inherited = int(manifest.details.get("continued_from", {}).get("skipped_steps", 0))
    num_skipped = int(manifest.value("skipped_steps")) - inherited
    run = f"the finished training {lineage.short(manifest.fingerprint)}"
    if num_skipped and config.train.on_bad_step == "stop":
        raise ConfigError(
            f"train.on_bad_step=stop, but {run} skipped {num_skipped} bad steps, at the first of which it would have "
            "ended; accept it with train.on_bad_step=skip, or change what makes steps bad, such as train.learning_rate"
        )
    traced = any(record.path.startswith("trace_rank_") for record in manifest.files)
    if config.train.trace_step and not traced:
        raise ConfigError(
            f"train.trace_step={config.train.trace_step}, but {run} left no trace, and is not run again for one; leave "
            "train.trace_step out, or trace another run, for example with another train.seed"
        )
    return True


STAGE = Stage("pretrain", parents=("prepare",), section=lineage.section, work=work, still_valid=is_valid)
