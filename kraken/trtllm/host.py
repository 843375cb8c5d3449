"""The process that owns an `LLM` over MPI; `ProcessBackend` in
`kraken/trtllm/backend.py` starts it and talks to it over a socket.

    python host.py FILE_DESCRIPTOR

TensorRT-LLM's MPI ranks run the command line of their parent again, so this is a plain script behind a guard. It ends
with its user: when the socket closes, however that came about, everything it started is ended too.
"""

import asyncio
import os
import socket
import sys
from typing import Any

SHUTDOWN_TIMEOUT_S = 20.0


async def serve(channel: socket.socket) -> None:
    """Read the launch, build the engine, run jobs until told to close or left alone."""
    from kraken.engine.protocol import EngineError, RequestError
    from kraken.trtllm import frames
    from kraken.trtllm.session import Job, Launch, Session, Step, make_llm, prepare

    reader, writer = await asyncio.open_connection(sock=channel)
    tasks: dict[str, asyncio.Task[None]] = {}

    def send(message: dict[str, Any], **arrays: Any) -> None:
        if not writer.is_closing():
            writer.write(frames.pack(message, arrays))

    async def run(job: Job) -> None:
        try:
            async for step in session.steps(job):
                send(_step_message(job.id, step), context_logits_TV=step.context_logits_TV, logits_TV=step.logits_TV)
                await writer.drain()
            send({"type": "end", "id": job.id})
        except RequestError as error:
            send({"type": "refused", "id": job.id, "message": str(error)})
        except EngineError as error:
            send({"type": "failed", "id": job.id, "message": str(error)})
        except Exception as error:  # its user waits for an answer
            send({"type": "failed", "id": job.id, "message": f"{type(error).__name__}: {error}"})
        finally:
            tasks.pop(job.id, None)

    def _step_message(job_id: str, step: Step) -> dict[str, Any]:
        return {
            "type": "step",
            "id": job_id,
            "token_ids": step.token_ids,
            "finish_reason": step.finish_reason,
            "timings_s": step.timings_s,
        }

    first, _ = await frames.read(reader)
    launch = Launch.from_json(first["launch"])
    try:
        # Blocks the loop on purpose: TensorRT-LLM wants the main thread, and there is nothing else to do yet.
        prepare(launch)
        session = Session(make_llm(launch))
    except Exception as error:
        send({"type": "fatal", "kind": type(error).__name__, "message": str(error)})
        await writer.drain()
        raise
    send({"type": "ready"})
    try:
        while True:
            message, _ = await frames.read(reader)
            match message["type"]:
                case "generate":
                    fields = message["job"]
                    job = Job(**fields | {"prompt_ids": tuple(fields["prompt_ids"])})
                    tasks[job.id] = asyncio.create_task(run(job))
                case "abort":
                    if task := tasks.get(message["id"]):
                        task.cancel()
                case "close":
                    break
    except EOFError:
        pass
    for task in list(tasks.values()):
        task.cancel()
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    await session.close(SHUTDOWN_TIMEOUT_S)


def main() -> None:
    from kraken.trtllm.tree import end_own_tree

    channel = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(channel.fileno(), False)  # ranks that held it would keep the socket open after our end
    status = 0
    try:
        asyncio.run(serve(channel))
    except BaseException as error:
        print(f"TensorRT-LLM's process ends: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        status = 1
    finally:
        end_own_tree()  # whatever shutdown left behind
        os._exit(status)  # threads of TensorRT-LLM must not keep this process


if __name__ == "__main__":
    main()
