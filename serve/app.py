"""The application builder, for Python (`ray_serve.run(build(args))`) and for Serve's command line and config files.

    serve run serve.app:build exchange=/data/exchange
    applications: [{name: kraken, import_path: "serve.app:build", args: {exchange: /data/exchange}}]

With KRAKEN_API_KEY in the environment of whoever calls `build`, clients must show that key. Address and port belong to
Serve itself (`ray_serve.start`), not to an application.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from ray.serve import Application, Deployment

from kraken.config import ConfigError, EngineConfig, ServeConfig, from_dict
from kraken.engine.echo import EchoEngine
from kraken.engine.protocol import Engine, EngineInfo
from kraken.manifest import MANIFEST_NAME
from kraken.tokenizer import Tokenizer, require_same_tokenizer
from serve.completions import ServedModel
from serve.deployment import Endpoint

API_KEY_VARIABLE = "KRAKEN_API_KEY"
ECHO_CONTEXT_LENGTH = 1024
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def _section(config_class: type, values: Any) -> Any:
    """Sections given as plain keys go through the config tree's own checks, which refuse unknown ones."""
    return from_dict(config_class, values) if isinstance(values, dict) else values


class ServeArgs(BaseModel):
    """What to serve, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    exchange: Path
    """Folder of an exchange checkpoint, reachable where the replicas run; the echo engine reads only its tokenizer."""
    engine: Literal["torch", "echo"] = "torch"
    engine_config: Annotated[EngineConfig, BeforeValidator(partial(_section, EngineConfig))] = EngineConfig()
    serve_config: Annotated[ServeConfig, BeforeValidator(partial(_section, ServeConfig))] = ServeConfig()
    echo_token_delay_s: float = 0.0
    """Pause of the echo engine before every token."""

    @model_validator(mode="after")
    def _refuse_what_has_no_effect(self) -> "ServeArgs":
        if self.echo_token_delay_s and self.engine != "echo":
            raise ValueError(f"echo_token_delay_s has no effect with engine={self.engine}; leave it out")
        return self


def build(args: ServeArgs) -> Application:
    """The Serve application; nothing is loaded before a replica starts."""
    return bind(partial(load_model, args), args.serve_config)


def bind(load: Callable[[], ServedModel], config: ServeConfig) -> Application:
    """An application around any model that `load` makes."""
    endpoint: Deployment = Endpoint.options(  # type: ignore[attr-defined]  # the decorator's result is typed as the class
        num_replicas=config.num_replicas,
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
    )
    return endpoint.bind(load, api_key_sha256(), loopback_only=config.host in LOOPBACK)


def api_key_sha256() -> bytes | None:
    """Digest of the key in the environment. Only the digest travels, so that no part of the cluster stores the key."""
    key = os.environ.get(API_KEY_VARIABLE)
    if key is None:
        return None
    if not key.strip():
        raise ConfigError(f"{API_KEY_VARIABLE} is set but empty; give it a key, or unset it to let every client in")
    return hashlib.sha256(key.strip().encode()).digest()


def load_model(args: ServeArgs) -> ServedModel:
    """Load tokenizer and engine; called in the replica, on its event loop.

    Raises:
        ArtefactError: the folder is incomplete, or its parts do not belong together.
    """
    tokenizer = Tokenizer.load(args.exchange)
    engine = _load_echo_engine(args, tokenizer) if args.engine == "echo" else _load_torch_engine(args)
    require_same_tokenizer(engine.info.tokenizer_fingerprint, tokenizer.fingerprint, "the engine", f"{args.exchange}")
    return ServedModel(
        name=args.serve_config.model_name,
        engine=engine,
        tokenizer=tokenizer,
        exchange_fingerprint=_exchange_fingerprint(args.exchange),
        max_choices=args.engine_config.max_queued_requests,
        created=int(time.time()),
    )


def _load_torch_engine(args: ServeArgs) -> Engine:
    from kraken.engine.torch_engine import TorchEngine  # torch is loaded only where a model is

    return TorchEngine.from_exchange(args.exchange, args.engine_config)


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
