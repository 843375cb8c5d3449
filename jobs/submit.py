"""Submit a job to a Ray cluster, with the git commit and the name of the submitter, which the cluster cannot know.

    export RAY_API_SERVER_ADDRESS=http://HEAD:8265 RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=~/.ray/auth_token
    python -m jobs.submit kraken_125m_4way --storage /shared/kraken          # jobs.end_to_end, followed to its end
    python -m jobs.submit --job pretrain --no-wait kraken_125m_4way --storage /shared/kraken

Of the checkout only the code folders are uploaded. MLFLOW_TRACKING_URI and KRAKEN_API_KEY travel with the job where
they are set here; whoever has the cluster's token can read them there. The exit status is the job's: 0, 1 for a
failure, 2 for something that the user can mend; after Ctrl-C 130, and the job goes on.
"""

import argparse
import asyncio
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import command
from jobs.command import INTERRUPTED, LineParser
from jobs.following import read
from jobs.local import CHECKOUT, CODE, excludes, exit_status, job_environment
from kraken.config import ConfigError
from kraken.environment import environment
from pipelines.errors import ClusterError
from pipelines.outbox import without_password
from pipelines.registry import Reference, is_reference

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

JOBS = ("end_to_end", "prepare", "pretrain", "convert", "evaluate", "deploy")
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
AGENT_LIMIT_S = 60.0
"""How long a cluster may take to have an agent that starts jobs."""
AGENT_POLL_S = 1.0


def main(argv: list[str]) -> int:
    """Submit one job; returns its exit status."""
    parser = LineParser(
        prog="python -m jobs.submit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--job", choices=JOBS, default="end_to_end", help="module of jobs/ to run (end_to_end)")
    parser.add_argument("--no-wait", action="store_true", help="return once the job is accepted")
    parser.add_argument(
        "preset", help="which run, for example kraken_125m_4way, or models:/NAME@ALIAS; its settings follow"
    )
    arguments, settings = parser.parse_known_args(argv)
    if not any(os.environ.get(name) for name in ADDRESS_VARIABLES):
        raise ConfigError(
            f"{ADDRESS_VARIABLES[0]} is not set; give it the cluster's dashboard, for example http://HEAD:8265, or use "
            "`make run` for a cluster on this machine"
        )
    with environment({"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}):  # judged as in the job: a relative storage is refused
        if is_reference(arguments.preset):  # its settings are those of its run, which the job will read
            name = Reference.parse(arguments.preset).name
            storage = command.absolute_storage(read(settings).get("storage", command.default_storage()))
        else:
            name = arguments.preset
            storage = command.parse(f"python -m jobs.{arguments.job}", "", [name, *settings]).config.storage
    entrypoint = ["python", "-m", f"jobs.{arguments.job}", arguments.preset, *settings]
    if not any(word.partition("=")[0] == "--storage" for word in settings):  # KRAKEN_STORAGE says it here only
        entrypoint += ["--storage", storage]
    return submit(entrypoint, name=name, wait=not arguments.no_wait)


def submit(entrypoint: list[str], *, name: str, working_dir: Path = CHECKOUT, wait: bool = True) -> int:
    """Upload the code and submit a command; follow it to its end, if asked to.

    Args:
        name: first part of the submission id.

    Returns:
        0 success or accepted, 2 the user's fault, 1 any other failure.

    Raises:
        ClusterError: the cluster does not answer, or refuses the job.
    """
    from ray.job_submission import JobSubmissionClient

    submission = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    variables = job_environment(submission)
    print(f"submit: uploading {describe_upload(working_dir)}", flush=True)
    shown = {name: "..." if name == "KRAKEN_API_KEY" else without_password(value) for name, value in variables.items()}
    print(f"submit: environment {' '.join(f'{key}={shlex.quote(value)}' for key, value in shown.items())}", flush=True)
    runtime_env = {"working_dir": str(working_dir), "excludes": excludes(working_dir), "env_vars": variables}
    try:
        client = JobSubmissionClient()
        job = {"entrypoint": shlex.join(entrypoint), "submission_id": submission, "runtime_env": runtime_env}
        _submit_when_an_agent_is_there(client, job)
    except (OSError, RuntimeError, ValueError) as error:
        address = next(value for name in ADDRESS_VARIABLES if (value := os.environ.get(name)))
        raise ClusterError(
            f"the cluster at {address} did not take the job ({str(error).strip().splitlines()[0]}); check that it "
            "runs, and that RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH give its token"
        ) from error
    print(
        f"submit: job {submission}; follow it with `ray job logs {submission} --follow`, stop it with "
        f"`ray job stop {submission}`",
        flush=True,
    )
    if not wait:
        return 0
    try:
        asyncio.run(_follow(client, submission))
    except KeyboardInterrupt:
        print("submit: the job goes on", flush=True)
        return INTERRUPTED
    info = client.get_job_info(submission)
    return exit_status(
        {"status": str(info.status.value), "driver_exit_code": info.driver_exit_code, "message": info.message}
    )


def _submit_when_an_agent_is_there(client: "JobSubmissionClient", job: dict[str, Any]) -> None:
    """Submit a job. The agent that starts jobs on the head comes seconds after the dashboard that takes them, so that a
    cluster that was just started refuses jobs for a while.

    Raises:
        RuntimeError: another reason, or no agent within `AGENT_LIMIT_S`.
    """
    ends_at = time.monotonic() + AGENT_LIMIT_S
    while True:
        try:
            client.submit_job(**job)
            return
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > ends_at:
                raise
        time.sleep(AGENT_POLL_S)


async def _follow(client: Any, submission: str) -> None:
    async for lines in client.tail_job_logs(submission):
        print(lines, end="", flush=True)


def describe_upload(working_dir: Path) -> str:
    """The upload in words: number of files and size of each folder."""
    folders = [name for name in CODE if (working_dir / name).is_dir()] or ["."]
    parts, total = [], 0
    for name in folders:
        paths = [path for path in (working_dir / name).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        total += sum(path.stat().st_size for path in paths)
        parts.append(f"{name}/ ({len(paths)} files)")
    return f"{', '.join(parts)}, {total / 1e6:.1f} MB; nothing else of {working_dir}"


if __name__ == "__main__":
    command.run_job(lambda argv: sys.exit(main(argv)))
