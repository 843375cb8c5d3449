"""One stage and whatever it needs that is not finished yet; `jobs/prepare.py` and its neighbours are this."""

from jobs.command import Arguments, absolute_storage, default_storage, parse, vary
from jobs.following import read
from kraken.config import ConfigError
from kraken.storage import join
from pipelines import end_to_end, needs
from pipelines.end_to_end import StageResult
from pipelines.registry import is_reference
from pipelines.stage import Stage

OF_REGISTERED = ("evaluate", "deploy")
"""Stages that a registered model can be given to, instead of a preset."""


def run_until(stage: Stage, description: str, argv: list[str]) -> None:
    """Run the pipeline up to a stage and print what that stage made."""
    prog = f"python -m jobs.{stage.kind}"
    if argv and is_reference(argv[0]):
        _run_registered(stage, prog, description, argv)
        return
    arguments = parse(prog, description, argv)
    if arguments.dry_run:
        print(needs.describe_plan(arguments.config, end_to_end.plan(arguments.config, stage.kind)))
        return
    show(stage.kind, end_to_end.run_and_advise(arguments.config, stage.kind)[stage.kind], arguments.config.storage)


def _run_registered(stage: Stage, prog: str, description: str, argv: list[str]) -> None:
    """Run a stage on a registered model, whose data, training and conversion stay as they are."""
    from pipelines import registered

    reference, *overrides = argv
    if stage.kind not in OF_REGISTERED:
        raise ConfigError(
            f"{reference}: {stage.kind} takes a preset; a registered model can be given to jobs.evaluate, jobs.deploy, "
            "jobs.generate and jobs.convert"
        )
    storage = absolute_storage(read(overrides).get("storage", default_storage()))
    found = registered.open_version(reference, storage)
    about = f"{description}\n\nOf {found.version.uri}; the defaults below are those it was made with."
    arguments = vary(Arguments, found.config, f"{prog} {reference}", about, overrides)
    config = arguments.config
    if arguments.dry_run:
        print(needs.describe_plan(config, end_to_end.plan(config, stage.kind, found.identify(config))))
        return
    show(stage.kind, registered.run(found, config, stage.kind)[stage.kind], storage)


def show(kind: str, result: StageResult, storage: str) -> None:
    """Print what a stage made."""
    manifest = result.manifest
    state = "reused" if result.reused else "finished"
    print(f"{kind} {state}: {join(storage, kind, manifest.fingerprint[:16])}")
    for name, metric in sorted(manifest.metrics.items()):
        value = f"{metric.value:,}" if isinstance(metric.value, int) else f"{metric.value:,.6g}"
        print(f"  {name:32} {value:>16} {metric.unit}")
    for name, value in sorted(manifest.details.items()):
        print(f"  {name:32} {value}")
