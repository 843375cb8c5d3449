"""Approval: a model passes its gates and becomes a version of the registry, or is refused and leaves a mark."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from kraken.config import ConfigError
from kraken.manifest import ArtefactError, write_atomically
from kraken.storage_id import storage_id
from pipelines import champion, gates
from pipelines.outbox import without_password
from pipelines.registry import Lineage, Registry, Version
from pipelines.stage import Work
from pipelines.tracking_server import CONNECT_LIMIT_S

Call = Callable[[Callable[[champion.Question], dict[str, float]], champion.Question], dict[str, float]]


@dataclass(frozen=True, slots=True)
class Approval:
    """A model that may be deployed."""

    registry: Registry
    version: Version
    champion: Version | None
    results: list[gates.Result]

    @property
    def details(self) -> dict[str, Any]:
        """For the manifest of the deployment."""
        return {"version": self.version.uri, "gates": [asdict(result) for result in self.results]}

    def promote(self, work: Work, endpoint: str) -> None:
        """Make the version the champion; its deployment has answered at `endpoint`."""
        config = work.config
        why = config.gates.reason or f"gates: {gates.verdict(self.results)}"
        if config.gates.reason and any(result.state == "forced" for result in self.results):
            why = f"{why} (gates: {gates.verdict(self.results)})"
        # the endpoint's settings, with which another version takes its place
        self.registry.set_tags(self.version, {SERVE_TAG: json.dumps(asdict(config.serve), sort_keys=True)})
        who = self.registry.submitter_of(work.run.run_id)
        event = self.registry.promote(self.version, why, endpoint, who)
        if event is not None:
            before = f", instead of version {event.previous}" if event.previous else ""
            print(f"deploy: {self.version.uri} is the champion{before} ({event.action})", flush=True)


SERVE_TAG = "kraken.serve"
"""On a version: the `serve` section of its newest deployment, as JSON."""
FORCED_TAG = "kraken.forced"
"""On a version: the gates that were forced, with the reasons, as JSON."""


def approve(work: Work, call: Call) -> Approval:
    """Judge the gates, record the results, and register the model.

    Args:
        work: of the deploy stage.
        call: see `champion.figures`.

    Raises:
        ArtefactError: a gate failed and was not forced. The champion stays; a version of this model is marked.
        ConfigError: the registry cannot be used.
    """
    config, name = work.config, work.config.serve.registry_name
    registry = Registry(config.storage, work.run.metrics_ref.tracking_uri)
    if not work.run.wait_until_open(CONNECT_LIMIT_S):  # a version belongs to a run
        raise ConfigError(
            f"the MLflow run of this stage does not open at {without_password(registry.uri)}; see that the server "
            "answers, then run the same command again: what is finished stays"
        )
    evaluation, own = work.parents["evaluate"], lineage_of(work)
    current = registry.champion(name)
    if damage := damage_of(work):
        figures = gates.Figures(damage=damage, obstacle="its files are damaged")
    else:
        figures = champion.figures(config, evaluation, own, current, call)
    results = gates.force(gates.judge(config.gates, evaluation, own, current, figures), config.gates.forced)
    verdict = gates.verdict(results)
    print(f"deploy: gates {verdict}\n{gates.table(results)}", flush=True)
    text = json.dumps([asdict(result) for result in results], indent=2)
    write_atomically(work.folder / gates.NAME, text)
    work.run.log_text(text, gates.NAME)
    work.run.log_text(gates.table(results) + "\n", gates.NAME.replace(".json", ".md"))
    work.run.set_tags({gates.GATES_TAG: verdict})
    if refusal := gates.refusal(results, current):
        if version := registry.find(name, own.exchange, own.storage_id):
            registry.set_tags(version, {gates.GATES_TAG: verdict})
        raise ArtefactError(refusal)
    settings = {"dtype": config.engine.dtype, "quantization": config.engine.quantization}
    version = registry.register(name, own, settings, work.run.run_id)
    forced = {result.gate: result.reason for result in results if result.state == "forced"}
    tags = {FORCED_TAG: json.dumps(forced)} if forced or FORCED_TAG in version.tags else {}
    registry.set_tags(version, {gates.GATES_TAG: verdict} | tags)
    work.run.set_tags({"kraken.version": version.uri})
    return Approval(registry, version, current, results)


def lineage_of(work: Work) -> Lineage:
    """The lineage of the model that the deploy stage is given."""
    config, convert, evaluation = work.config, work.parents["convert"], work.parents["evaluate"]
    engine = evaluation.config["engine"]
    return Lineage(
        exchange=convert.fingerprint,
        storage_id=storage_id(config.storage),
        location=without_password(work.parent_location("convert")),
        storage=without_password(config.storage),
        prepare=convert.parents["prepare"],
        pretrain=convert.parents["pretrain"],
        evaluate=evaluation.fingerprint,
        checkpoint=str(convert.details["checkpoint"]),
        pipeline=config.name,
        experiment=config.experiment,
        tokenizer=str(convert.details["tokenizer_fingerprint"]),
        engine=f"{evaluation.details['engine']}, dtype {engine['dtype']}, quantization {engine['quantization']}",
        parity_max_abs_diff=repr(evaluation.value("parity_max_abs_diff")),
        validation_loss=repr(evaluation.value("validation_loss")),
        perplexity=repr(evaluation.value("validation_perplexity")),
        bits_per_byte=repr(evaluation.value("bits_per_byte")),
        scored_tokens=str(int(evaluation.value("scored_tokens"))),
    )


def damage_of(work: Work) -> str:
    """What is wrong with the model's files or with what was evaluated, in words; empty if nothing is."""
    convert, evaluation = work.parents["convert"], work.parents["evaluate"]
    if evaluation.parents["convert"] != convert.fingerprint:
        return f"the evaluation is of the model {evaluation.parents['convert'][:16]}, not of {convert.fingerprint[:16]}"
    try:
        convert.verify(work.parent_folder("convert"))
    except (ArtefactError, OSError) as error:
        return str(error).partition(";")[0]
    return ""
