"""Stage 2, pretrain: Ray Train workers run `kraken.training`; checkpoints in the stage's folder, metrics in MLflow."""

from pipelines.stage import Outcome, Stage, Work, section_of


def work(work: Work) -> Outcome:
    # torch and Ray Train, seconds that a reused stage need not spend
    from kraken.data.splits import require_windows
    from pipelines.training.workers import fit

    require_windows(work.parent_folder("prepare"), work.parents["prepare"], work.config.model.context_length)
    return fit(work), {"tokenizer_fingerprint": work.parents["prepare"].details["tokenizer_fingerprint"]}


STAGE = Stage("pretrain", parents=("prepare",), section=section_of("model", "train"), work=work)
