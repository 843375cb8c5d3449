"""The two ways in which TensorRT-LLM runs, behind one interface: a process tree of its own, and Ray workers."""

import asyncio
import contextlib
import dataclasses
import itertools
import os
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from kraken.engine.placement import Placement
from kraken.engine.protocol import EngineError, RequestError
from kraken.trtllm import frames
from kraken.trtllm.session import Job, Launch, Session, Step, clean_environment, make_async_llm, prepare
from kraken.trtllm.tree import MARK, end_marked, environments

SHUTDOWN_TIMEOUT_S = 30.0
HOST = Path(__file__).with_name("host.py")
ROOT = Path(__file__).parents[2]


class Backend(Protocol):
    """A running TensorRT-LLM. All of it on one event loop."""

    async def start(self, timeout_s: float) -> None:
        """Be ready to run jobs; after a failure nothing is left.

        Raises:
            EngineError: it failed, or was not ready in time.
        """
        ...

    def steps(self, job: Job) -> AsyncGenerator[Step, None]:
        """Run a job; leaving early aborts it."""
        ...

    @property
    def alive(self) -> bool:
        """Whether the processes it rests on are there, as far as that is known without asking them."""
        ...

    async def close(self) -> None:
        """End everything it started; safe to call twice, and before it was started."""
        ...


class RayBackend:
    """`AsyncLLM` over Ray workers, in the process that calls it: a Serve replica.

    Args:
        placement: a bundle per way in a placement group that this process belongs to.
    """

    def __init__(self, launch: Launch, placement: Placement):
        self._launch = launch
        self._placement = placement
        self._session: Session | None = None

    async def start(self, timeout_s: float) -> None:
        clean_environment(os.environ)
        try:
            prepare(self._launch)
            async with asyncio.timeout(timeout_s):
                llm = await make_async_llm(self._launch, self._placement)
        except TimeoutError as error:
            raise _too_slow(timeout_s) from error
        except Exception as error:
            raise EngineError(f"TensorRT-LLM did not start: {type(error).__name__}: {error}") from error
        self._session = Session(llm)

    def steps(self, job: Job) -> AsyncGenerator[Step, None]:
        assert self._session is not None, "start() comes first"
        return self._session.steps(job)

    @property
    def alive(self) -> bool:
        return self._session is not None

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            try:
                await session.close(SHUTDOWN_TIMEOUT_S)
            except TimeoutError as error:
                raise EngineError(
                    f"TensorRT-LLM did not shut down within {SHUTDOWN_TIMEOUT_S:.0f} s; its Ray workers end with this "
                    "replica"
                ) from error


class ProcessBackend:
    """`LLM` over MPI, in a process of its own with the tree of ranks below it."""

    def __init__(self, launch: Launch):
        self._launch = launch
        self.mark = uuid.uuid4().hex
        """Every process of the tree carries it; see `kraken/trtllm/tree.py`."""
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._listening: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None] | None = None
        self._jobs: dict[str, asyncio.Queue[Step | Exception | None]] = {}
        self._numbers = itertools.count()
        self._is_cut = False  # the connection ends a moment before the process can be seen to have ended

    async def start(self, timeout_s: float) -> None:
        ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # open until close()
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with theirs:
            self._process = subprocess.Popen(
                # -P: the script's own folder must not shadow anything
                [sys.executable, "-P", str(HOST), str(theirs.fileno())],
                env=os.environ | {MARK: self.mark, "PYTHONPATH": path},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,
            )
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._ready = asyncio.get_running_loop().create_future()
        self._listening = asyncio.create_task(self._listen(reader))
        self._send({"type": "launch", "launch": dataclasses.asdict(self._launch)})
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready
        except TimeoutError as error:
            await self.close()
            raise _too_slow(timeout_s) from error
        except BaseException:
            await self.close()
            raise

    async def steps(self, job: Job) -> AsyncGenerator[Step, None]:
        if not self.alive:
            raise EngineError(f"TensorRT-LLM's process has ended: {self._last_words()}")
        # A name of its own: answers to an aborted job may still arrive when its id is used again.
        job = dataclasses.replace(job, id=f"{job.id}/{next(self._numbers)}")
        arrived = self._jobs[job.id] = asyncio.Queue()
        is_over = False
        try:
            self._send({"type": "generate", "job": dataclasses.asdict(job)})
            while True:
                item = await arrived.get()
                is_over = not isinstance(item, Step)
                if item is None:
                    return
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            del self._jobs[job.id]
            if not is_over:
                self._send({"type": "abort", "id": job.id})

    @property
    def alive(self) -> bool:
        is_running = self._process is not None and self._process.poll() is None
        return is_running and self._writer is not None and not self._is_cut

    def environments(self) -> list[dict[str, str]]:
        """Environment variables of every process of the tree."""
        return list(environments(self.mark).values())

    async def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        is_started = self._ready is not None and self._ready.done() and not self._ready.cancelled()
        if is_started and process.poll() is None:
            self._send({"type": "close"})
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(process.wait, SHUTDOWN_TIMEOUT_S)
        left = await asyncio.to_thread(end_marked, self.mark)
        await asyncio.to_thread(process.wait)
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._log is not None:
            self._log.close()
        if left:
            raise EngineError(f"processes {left} of TensorRT-LLM could not be ended; end them by hand")

    def _send(self, message: dict[str, Any]) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frames.pack(message))

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        assert self._ready is not None
        try:
            while True:
                message, arrays = await frames.read(reader)
                self._receive(message, arrays)
        except EOFError:
            self._is_cut = True
            error = EngineError(f"TensorRT-LLM's process has ended: {self._last_words()}")
            if not self._ready.done():
                self._ready.set_exception(error)
            for arrived in self._jobs.values():
                arrived.put_nowait(error)

    def _receive(self, message: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        assert self._ready is not None
        if message["type"] == "ready":
            self._ready.set_result(None)
            return
        if message["type"] == "fatal":
            self._ready.set_exception(
                EngineError(f"TensorRT-LLM did not start: {message['kind']}: {message['message']}")
            )
            return
        arrived = self._jobs.get(message["id"])
        if arrived is None:  # aborted here already
            return
        match message["type"]:
            case "step":
                arrived.put_nowait(
                    Step(
                        token_ids=tuple(message["token_ids"]),
                        finish_reason=message["finish_reason"],
                        timings_s=message["timings_s"],
                        context_logits_TV=arrays.get("context_logits_TV"),
                        logits_TV=arrays.get("logits_TV"),
                    )
                )
            case "refused":
                arrived.put_nowait(RequestError(message["message"]))
            case "failed":
                arrived.put_nowait(EngineError(message["message"]))
            case "end":
                arrived.put_nowait(None)

    def _last_words(self) -> str:
        """The end of what the process printed."""
        if self._log is None or self._log.closed:
            return "closed"
        num_bytes = os.fstat(self._log.fileno()).st_size
        tail = os.pread(self._log.fileno(), 2000, max(0, num_bytes - 2000))  # seeking would move the process's end too
        lines = tail.decode(errors="replace").strip().splitlines()
        return lines[-1][:500] if lines else "it printed nothing"


def _too_slow(timeout_s: float) -> EngineError:
    return EngineError(
        f"TensorRT-LLM was not ready within engine.startup_timeout_s={timeout_s:g} and was ended; raise it if the "
        "machine is only slow"
    )
