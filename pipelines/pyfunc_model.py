"""The registered model as MLflow loads it: prompts in, completions out, without Ray.

    model = mlflow.pyfunc.load_model("models:/kraken@champion")
    model.predict(["def main"], params={"max_tokens": 64, "temperature": 0.0})        # -> ["():\\n ..."]

MLflow copies this file beside the code of `kraken` into the model and runs it when the model is loaded. The weights
are not copied: the model names the converted model's place in the storage, which the loading machine must reach.
"""

import asyncio
import itertools
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModel

from kraken.config import EngineConfig
from kraken.engine.engine import TorchEngine
from kraken.engine.prompt import encode_for_completion
from kraken.engine.protocol import Request, SamplingParams, check_stop_strings
from kraken.manifest import ArtefactError, Manifest
from kraken.storage import local_artefact
from kraken.tokenizer import Tokenizer

NO_SEED = -1
"""MLflow's parameters have no None."""


class KrakenModel(PythonModel):
    """A converted model behind MLflow's interface; calls from several threads share one engine and its batches."""

    def load_context(self, context: Any) -> None:
        """Open the model that `model_config` names, and start its engine on an event loop of its own.

        Raises:
            ArtefactError: it is no longer there, or another model has taken its place.
        """
        config = context.model_config
        try:
            exchange = local_artefact(config["exchange"])
            found = Manifest.read(exchange).fingerprint
        except ArtefactError as error:
            raise ArtefactError(
                f"the weights of this model lie in {config['exchange']}, and cannot be read there ({error}); load it "
                "where that storage is reachable, or register the model again"
            ) from error
        if found != config["fingerprint"]:
            raise ArtefactError(
                f"{config['exchange']} holds the model {found[:16]}, and this version is {config['fingerprint'][:16]}; "
                "load another version"
            )
        self._tokenizer = Tokenizer.load(exchange)
        self._counter = itertools.count()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="kraken engine", daemon=True).start()
        engine = EngineConfig(kind="torch", dtype=config["dtype"], quantization=config["quantization"])
        self._engine: TorchEngine = self._submit(_open(exchange, engine)).result()

    def predict(  # type: ignore[override]  # MLflow leaves out a context that nobody takes
        self, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """Complete prompts, all of them at once.

        Args:
            model_input: one column of texts; MLflow makes it of a list.
            params: `max_tokens`, `temperature`, `top_p`, `top_k`, `seed` (-1: a random one), `stop` (texts).

        Raises:
            RequestError: a prompt does not fit the context, or a parameter is out of range.
        """
        values = dict(params or {})
        stop = [text for text in values.pop("stop", ()) if text]
        check_stop_strings(stop)
        if values.get("seed", NO_SEED) == NO_SEED:
            values["seed"] = None
        info = self._engine.info
        sampling = SamplingParams(**values, stop_ids=(info.eot_id,))
        requests = [
            Request(
                id=f"predict-{next(self._counter)}",
                prompt_ids=tuple(
                    encode_for_completion(self._tokenizer, text, sampling.max_tokens, info.context_length)
                ),
                sampling=sampling,
            )
            for text in model_input.iloc[:, 0]
        ]
        return self._submit(self._complete(requests, stop)).result()

    async def _complete(self, requests: list[Request], stop: list[str]) -> list[str]:
        return list(await asyncio.gather(*(self._text(request, stop) for request in requests)))

    async def _text(self, request: Request, stop: list[str]) -> str:
        from kraken.engine.detokenizer import TextOutput, generate_text

        async with aclosing(generate_text(self._engine, self._tokenizer, request, stop)) as outputs:
            return "".join([output.text async for output in outputs if isinstance(output, TextOutput)])

    def _submit(self, work: "Coroutine[Any, Any, Any]") -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)


async def _open(exchange: Any, config: EngineConfig) -> TorchEngine:
    return TorchEngine.from_exchange(exchange, config)


mlflow.models.set_model(KrakenModel())
