"""A model on the stand-in for TensorRT-LLM: W processes with their parts of a TensorRT-LLM folder, stepped from here.

The stand-in is on the path of those processes only.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FAKE = Path(__file__).parent / "fake_trtllm"
START_TIMEOUT_S = 120
STEP_TIMEOUT_S = 120.0


def environment(**changes: str) -> dict[str, str]:
    """The environment of a process that finds the stand-in and the project."""
    path = os.pathsep.join([str(FAKE), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | changes


class RankFailureError(RuntimeError):
    """The ranks are gone; the message is the end of what they wrote."""


class RankServer:
    """A process that has imported the stand-in once, and forks the ranks of any number of models.

    Safe to start from a process with threads.
    """

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(FAKE / "worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=environment(),
        )

    def start(self, options: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(options) + "\n")
        self.process.stdin.flush()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        finally:
            self.process.kill()
            self.process.wait()


class Ranks:
    """The ranks of one model. Request ids are numbers of the caller's choice, each with a cache of its own.

    Blocks until the model is loaded; use it as a context manager, or `close` it.

    Args:
        orchestrator: whose `Mapping.tp_rank` to imitate.
        strategy: TensorRT-LLM's `allreduce_strategy`.
        server: forks the ranks; None starts one for this model alone.
        model_kwargs: override keys of config.json.

    Raises:
        RankFailureError: a rank failed; here and in every method.
    """

    def __init__(
        self,
        folder: Path,
        num_ranks: int,
        *,
        orchestrator: str = "mpi",
        strategy: str = "AUTO",
        device: str = "cpu",
        server: RankServer | None = None,
        **model_kwargs: Any,
    ):
        self._scratch = tempfile.TemporaryDirectory(prefix="ranks", dir="/tmp")  # a socket's path must be short
        scratch = Path(self._scratch.name)
        self._errors = scratch / "errors"
        self._own_server = RankServer() if server is None else None
        self._connection: socket.socket | None = None
        options = {
            "folder": str(folder),
            "num_ranks": num_ranks,
            "strategy": strategy,
            "device": device,
            "model_kwargs": model_kwargs,
            "environment": {"TLLM_DISABLE_MPI": "1" if orchestrator == "ray" else "0"},
            "rendezvous": str(scratch / "rendezvous"),
            "socket": str(scratch / "socket"),
            "errors": str(self._errors),
        }
        try:
            self._connect(server or self._own_server, options)
            self.max_seq_len: int = self._read()["max_seq_len"]
        except BaseException:
            self.close()
            raise

    def step(self, requests: dict[int, Sequence[int]], all_logits: bool = False) -> dict[int, list[list[float]]]:
        """One forward pass over the new tokens of every request: prefill for a new id, else decoding.

        Returns:
            Request id -> float32 logits [1, V] of its last token, or [T, V] of all new tokens.
        """
        command = {"requests": [[i, list(ids)] for i, ids in requests.items()], "all_logits": all_logits}
        return {int(i): logits for i, logits in self._ask(command).items()}

    def free(self, request_id: int) -> None:
        """Forget the cache of a request."""
        self._ask({"free": request_id})

    def report(self) -> dict[str, Any]:
        """`all_reduces`: (shape, type, strategy) of rank 0 since the last report; `meta_init`: built without memory."""
        return self._ask({"report": True})

    def close(self) -> None:
        """Returns once every rank is gone."""
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_WR)
                while self._connection.recv(2**16):  # ends when rank 0, which waits for the others, ends
                    pass
            self._connection.close()
        if self._own_server is not None:
            self._own_server.close()
        self._scratch.cleanup()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self, server: RankServer | None, options: dict[str, Any]) -> None:
        assert server is not None
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(options["socket"])
            listener.listen(1)
            listener.settimeout(1.0)
            server.start(options)
            for _ in range(START_TIMEOUT_S):
                if server.process.poll() is not None:
                    raise RankFailureError("the server of ranks has ended")
                with contextlib.suppress(TimeoutError):
                    self._connection, _ = listener.accept()
                    self._connection.settimeout(STEP_TIMEOUT_S)
                    self._lines = self._connection.makefile("r")
                    return
        raise RankFailureError(f"no rank has connected in {START_TIMEOUT_S} s")

    def _ask(self, command: dict[str, Any]) -> Any:
        assert self._connection is not None
        with contextlib.suppress(BrokenPipeError):
            self._connection.sendall(json.dumps(command).encode() + b"\n")
        return self._read()

    def _read(self) -> Any:
        with contextlib.suppress(ConnectionResetError):
            if line := self._lines.readline():
                return json.loads(line)
        raise RankFailureError(self._errors.read_text()[-6000:])


def run_with_fake(code: str, **changes: str) -> str:
    """Run Python code that finds the stand-in; gives what it printed.

    Raises:
        RankFailureError: it failed.
    """
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(**changes), capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise RankFailureError(f"status {result.returncode}: {result.stderr[-6000:]}")
    return result.stdout
