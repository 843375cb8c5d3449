"""One stage and whatever it needs that is not finished yet; `jobs/prepare.py` and its neighbours are this."""

from jobs.command import parse
from kraken.storage import join
from pipelines import end_to_end
from pipelines.stage import Stage


def run_until(stage: Stage, description: str, argv: list[str]) -> None:
    """Run the pipeline up to a stage and print what that stage made."""
    arguments = parse(f"python -m jobs.{stage.kind}", description, argv)
    if arguments.dry_run:
        print(end_to_end.describe(end_to_end.plan(arguments.config, stage.kind)))
        return
    result = end_to_end.run_and_advise(arguments.config, stage.kind)[stage.kind]
    manifest = result.manifest
    state = "reused" if result.reused else "finished"
    print(f"{stage.kind} {state}: {join(arguments.config.storage, stage.kind, manifest.fingerprint[:16])}")
    for name, metric in sorted(manifest.metrics.items()):
        value = f"{metric.value:,}" if isinstance(metric.value, int) else f"{metric.value:,.6g}"
        print(f"  {name:32} {value:>16} {metric.unit}")
    for name, value in sorted(manifest.details.items()):
        print(f"  {name:32} {value}")
