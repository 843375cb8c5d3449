"""The replica: the HTTP API in front of one engine, in one process, so that no token takes a second hop.

Ray Serve cancels the handler of a client that has left; everything below here lets that cancellation through to the
engine. Requests queue inside the engine, which knows its batch, and never in Serve.
"""

from collections.abc import Callable

from fastapi import FastAPI
from ray import serve as ray_serve

from kraken.engine import protocol as engine_protocol
from kraken.engine.protocol import SamplingParams
from serve.api import Api
from serve.api_key import ApiKeyDigest, KeyRing
from serve.completions import ServedModel
from serve.ray_internals import keep_replica_on_loopback
from serve.record import log_requests_to_stdout

DRAIN_TIMEOUT_S = 60
"""A replica that is told to stop finishes what it has begun, for this long."""
HEALTH_CHECK_PERIOD_S = 1
MAX_ONGOING_REQUESTS = 10_000
"""Far above what the engine queues: it must be the engine that refuses, with 429 and Retry-After."""


@ray_serve.deployment(
    name="endpoint",
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
    graceful_shutdown_timeout_s=DRAIN_TIMEOUT_S,
    graceful_shutdown_wait_loop_s=0.5,
    health_check_period_s=HEALTH_CHECK_PERIOD_S,
    logging_config={"enable_access_log": False},
)
@ray_serve.ingress()
class Endpoint:
    """One replica.

    Args:
        load: makes the model, in the replica and on its event loop, where the engine will run.
        api_key: digest of the key that clients must show; None lets everybody in.
        api_keys_file: names more keys; empty for none.
        loopback_only: nothing of this replica listens on another address.
        deployment: digest of what is served and how, for `/health`.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        load: Callable[[], ServedModel],
        api_key: ApiKeyDigest | None = None,
        api_keys_file: str = "",
        loopback_only: bool = False,
        deployment: str | None = None,
    ) -> None:
        if loopback_only:
            keep_replica_on_loopback()
        log_requests_to_stdout()
        keys = KeyRing(api_key, api_keys_file)
        self._model = load()
        await warm_up(self._model)
        self._api = Api(self._model, keys, deployment, ray_serve.get_replica_context().replica_tag)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor."""
        return self._api.app()

    async def check_health(self) -> None:
        """Asked by Serve, which replaces a replica that raises."""
        stats = self._model.engine.stats()
        if not stats.healthy:
            raise RuntimeError(f"the engine is unhealthy: {stats.failure}")


async def warm_up(model: ServedModel) -> None:
    """Run the longest request once, before the replica is ready: what compiles, allocates or fails does so here."""
    info = model.engine.info
    prompt_ids = (info.eot_id,) * max(1, info.context_length - 2)
    sampling = SamplingParams(max_tokens=2, temperature=0.0)
    request = engine_protocol.Request(id="warm-up", prompt_ids=prompt_ids, sampling=sampling)
    async for _output in model.engine.generate(request):
        pass
