"""Stage 2, pretrain: Ray Train workers run `kraken.training`; checkpoints in the stage's folder, metrics in MLflow."""

from pipelines.stage import Outcome, Stage, Work, section_of


def work(work: Work) -> Outcome:
    from pipelines.training.workers import fit  # torch and Ray Train, seconds that a reused stage need not spend

    return fit(work), {"tokenizer_fingerprint": work.parents["prepare"].details["tokenizer_fingerprint"]}


STAGE = Stage("pretrain", parents=("prepare",), section=section_of("model", "train"), work=work)
