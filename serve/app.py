"""The application builder, for Python (`ray_serve.run(build(args))`) and for Serve's command line and config files.

    serve run serve.app:build exchange=/data/exchange engine=torch
    applications: [{name: kraken, import_path: "serve.app:build", args: {exchange: s3://bucket/kraken/convert/0123456789abcdef}}]

With KRAKEN_API_KEY in the environment of whoever calls `build`, clients must show that key. Address and port belong to
Serve itself (`ray_serve.start`), not to an application.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import ray
from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from ray.serve import Application, Deployment
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kraken.choose_engine import (
    Choice,
    choose_for,
    find_machine,
    num_ways_of,
    open_engine,
)
from kraken.config import ConfigError, EngineConfig, EngineKind, ServeConfig, from_dict
from kraken.engine.echo import EchoEngine
from kraken.engine.placement import REPLICA_ENVIRONMENT, Machine, Placement
from kraken.engine.protocol import Engine, EngineInfo
from kraken.manifest import MANIFEST_NAME
from kraken.storage import is_remote, local_artefact
from kraken.tokenizer import Tokenizer, require_same_tokenizer
from serve.api_key import API_KEY_VARIABLE as API_KEY_VARIABLE
from serve.api_key import ApiKeyDigest, KeyRing, api_key
from serve.chat_template import ChatTemplate
from serve.completions import ServedModel
from serve.deployment import Endpoint

logger = logging.getLogger("ray.serve")

ECHO_CONTEXT_LENGTH = 1024
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def _path_or_uri(value: Any) -> Any:
    """A URI stays text, since `Path` would drop one of its slashes."""
    return value if isinstance(value, str) and is_remote(value) else Path(value)


def _section(config_class: type, values: Any) -> Any:
    """Sections given as plain keys go through the config tree's own checks, which refuse unknown ones."""
    return from_dict(config_class, values) if isinstance(values, dict) else values


class ServeArgs(BaseModel):
    """What to serve, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    exchange: Annotated[Path | str, BeforeValidator(_path_or_uri)]
    """An exchange checkpoint: a folder that every node with a replica mounts, or a URI of the convert stage's artefact,
    which every replica fetches into its node's cache. The echo engine reads only its tokenizer."""
    engine: EngineKind | Literal["echo"] | None = None
    """None: what `engine_config.kind` says."""
    engine_config: Annotated[EngineConfig, BeforeValidator(partial(_section, EngineConfig))] = EngineConfig()
    serve_config: Annotated[ServeConfig, BeforeValidator(partial(_section, ServeConfig))] = ServeConfig()
    echo_token_delay_s: float = 0.0
    """Pause of the echo engine before every token."""
    deployment: str | None = None
    """Digest of everything that decides what is served and how; `/health` shows it, so that a later deployment can be
    compared with it. A new digest replaces every replica."""

    @model_validator(mode="after")
    def _refuse_what_has_no_effect(self) -> "ServeArgs":
        if self.echo_token_delay_s and self.engine != "echo":
            raise ValueError(f"echo_token_delay_s has no effect with engine={self.engine}; leave it out")
        if self.engine == "tensorrt_llm" and self.serve_config.gpus_per_replica:
            raise ValueError(
                f"serve.gpus_per_replica={self.serve_config.gpus_per_replica:g} has no effect with "
                "engine=tensorrt_llm, which reserves a GPU for every way; leave it out"
            )
        return self

    def folder(self) -> Path:
        """The exchange checkpoint's local folder, fetched where `exchange` is a URI.

        Raises:
            ArtefactError: nothing finished is there, or the storage does not answer.
        """
        return local_artefact(str(self.exchange))

    @property
    def resolved_engine_config(self) -> EngineConfig:
        """The engine's settings with the kind that was asked for."""
        if self.engine is None or self.engine == "echo":
            return self.engine_config
        return dataclasses.replace(self.engine_config, kind=self.engine)


def build(args: ServeArgs) -> Application:
    """The Serve application; nothing is loaded before a replica starts.

    Raises:
        ConfigError: TensorRT-LLM is asked for and not possible.
    """
    if args.engine == "echo":
        return bind(partial(load_model, args), args.serve_config, deployment=args.deployment)
    exchange = args.folder()
    num_ways = num_ways_of(exchange)
    choice = choose_for(exchange, args.resolved_engine_config, partial(find_serving_machine, num_ways))
    logger.info("%s", choice)
    bundles = replica_bundles(args.serve_config, num_ways) if choice.kind == "tensorrt_llm" else ()
    return bind(partial(load_model, args, choice), args.serve_config, bundles, args.deployment)


def replica_bundles(config: ServeConfig, num_ways: int) -> tuple[dict[str, float], ...]:
    """What a TensorRT-LLM replica reserves: its own process first, then a GPU with a CPU for every way."""
    return ({"CPU": max(1.0, config.cpus_per_replica)}, *({"CPU": 1.0, "GPU": 1.0} for _ in range(num_ways)))


def find_serving_machine(num_ways: int) -> Machine:
    """Look at the node of the cluster that has most GPUs; at this machine where there is no cluster yet."""
    if not ray.is_initialized():
        return find_machine()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    largest = max(nodes, key=lambda node: node["Resources"].get("GPU", 0.0))
    num_gpus = int(largest["Resources"].get("GPU", 0.0))
    if num_gpus < num_ways:
        return Machine(version=None, num_gpus=num_gpus)
    there = NodeAffinitySchedulingStrategy(largest["NodeID"], soft=False)
    machine = ray.get(ray.remote(num_cpus=0)(find_machine).options(scheduling_strategy=there).remote())
    return dataclasses.replace(machine, num_gpus=num_gpus)


def bind(
    load: Callable[[], ServedModel],
    config: ServeConfig,
    bundles: Sequence[dict[str, float]] = (),
    deployment: str | None = None,
) -> Application:
    """An application around any model that `load` makes.

    Args:
        bundles: a placement group for every replica, which runs in the first of them; without, `config` says what a
            replica reserves.
        deployment: digest that `/health` shows.

    Raises:
        ConfigError: KRAKEN_API_KEY is set but empty, or the file of keys is wrong.
    """
    key = api_key()
    digest = None if key is None else ApiKeyDigest.of(key)
    KeyRing(digest, config.api_keys_file)  # refuses a wrong file here already
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica}
    }
    if bundles:
        options = {
            # Without a GPU of its own: those of its group belong to TensorRT-LLM's workers.
            "ray_actor_options": {
                "num_cpus": config.cpus_per_replica,
                "num_gpus": 0,
                "runtime_env": {"env_vars": dict(REPLICA_ENVIRONMENT)},
            },
            "placement_group_bundles": list(bundles),
            "placement_group_strategy": "STRICT_PACK",  # workers and replica talk over Unix sockets
        }
    endpoint: Deployment = Endpoint.options(  # type: ignore[attr-defined]  # the decorator's result is typed as the class
        num_replicas=config.num_replicas, **options
    )
    return endpoint.bind(
        load,
        digest,
        config.api_keys_file,
        loopback_only=config.host in LOOPBACK,
        deployment=deployment,
    )


def load_model(args: ServeArgs, choice: Choice | None = None) -> ServedModel:
    """Load tokenizer and engine; called in the replica, on its event loop.

    Args:
        choice: the engine; None chooses here.

    Raises:
        ArtefactError: the folder is incomplete, or its parts do not belong together.
    """
    exchange = args.folder()
    tokenizer = Tokenizer.load(exchange)
    engine = _load_echo_engine(args, tokenizer) if args.engine == "echo" else _load_engine(args, exchange, choice)
    require_same_tokenizer(engine.info.tokenizer_fingerprint, tokenizer.fingerprint, "the engine", f"{exchange}")
    return ServedModel(
        name=args.serve_config.model_name,
        engine=engine,
        tokenizer=tokenizer,
        exchange_fingerprint=_exchange_fingerprint(exchange),
        max_choices=args.engine_config.max_queued_requests,
        created=int(time.time()),
        chat_template=ChatTemplate.load(exchange),
        stream_interval_s=args.serve_config.stream_interval_ms / 1e3,
    )


def _load_engine(args: ServeArgs, exchange: Path, choice: Choice | None) -> Engine:
    config = args.resolved_engine_config
    choice = choice or choose_for(exchange, config)
    logger.info("%s", choice)
    if choice.kind == "torch":
        return open_engine(choice, exchange, config)
    bundle_indices = tuple(range(1, num_ways_of(exchange) + 1))  # the first bundle is this replica's
    return open_engine(choice, exchange, config, Placement(group=_own_group(), bundle_indices=bundle_indices))


def _own_group() -> Any:
    group = get_current_placement_group()
    if group is None:
        raise ConfigError(
            "engine=tensorrt_llm needs a placement group around the replica; make the application by `build`"
        )
    return group


def _load_echo_engine(args: ServeArgs, tokenizer: Tokenizer) -> Engine:
    info = EngineInfo(
        name="echo",
        context_length=ECHO_CONTEXT_LENGTH,
        num_ids=tokenizer.num_ids,
        eot_id=tokenizer.eot_id,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    return EchoEngine(info, args.echo_token_delay_s, args.engine_config)


def _exchange_fingerprint(folder: Path) -> str | None:
    path = folder / MANIFEST_NAME
    return json.loads(path.read_text())["fingerprint"] if path.is_file() else None
