"""Jobs of a local Ray cluster: submit, follow and stop one, and list those that run.

`ray job submit` hands a job in; everything else goes through the REST interface of the dashboard, and the job's log is
read from the head's folder. Ray is not imported here.
"""

import codecs
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from pipelines.errors import ClusterError
from pipelines.local_head import Head, loopback_without_proxy, process_of, ray_dir


class Job:
    """A job of the cluster, by its submission id."""

    def __init__(self, head: Head, submission_id: str):
        self.head = head
        self.submission_id = submission_id
        self._log: IO[bytes] | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._preface: str | None = ""

    def submit(
        self,
        entrypoint: Sequence[str],
        *,
        working_dir: Path,
        excludes: Sequence[str] = (),
        env_vars: Mapping[str, str] | None = None,
    ) -> None:
        """Hand a command to the cluster by `ray job submit`; returns once it is accepted.

        Raises:
            ClusterError: it is refused; the message is Ray's.
        """
        environment = {**os.environ, **self.head.client_environment(), **loopback_without_proxy()}
        environment.pop("RAY_ADDRESS", None)
        # A file, since a command line can be read by everybody and the variables may hold a key.
        with tempfile.NamedTemporaryFile("w", dir=self.head.temp_dir, suffix=".yaml") as runtime_env:
            json.dump({"excludes": list(excludes), "env_vars": dict(env_vars or {})}, runtime_env)
            runtime_env.flush()
            command = [str(Path(self.head.python).with_name("ray")), "job", "submit", "--no-wait"]
            command += ["--submission-id", self.submission_id, "--working-dir", str(working_dir)]
            command += ["--runtime-env", runtime_env.name, "--", *entrypoint]
            status, output = _run(command, environment)
        if status != 0:
            lines = [line for line in output.splitlines() if line.strip()]
            raise ClusterError("`ray job submit` failed:\n" + "\n".join(f"  {line}" for line in lines[-8:]))

    def stop(self) -> None:
        """Ask for SIGTERM to the driver; a job that is unknown or has ended is left alone."""
        with contextlib.suppress(urllib.error.HTTPError):
            self.head.request("POST", f"/api/jobs/{self.submission_id}/stop")

    def follow(self, out: IO[str] | None = None) -> dict[str, Any]:
        """Copy the job's output to `out` until the job ends; after an interruption another call goes on where it was.

        Returns:
            Ray's record of the job: `status`, `driver_exit_code`, `message`, ...

        Raises:
            ClusterError: the cluster ended before the job, or knows no such job.
        """
        out = out or sys.stdout
        while True:
            record = self._record()
            ended = record is not None and record["status"] in ("SUCCEEDED", "FAILED", "STOPPED")
            for _ in range(4):
                self._copy_log(out)
                if ended:
                    assert record is not None
                    return record
                time.sleep(0.1)

    def _record(self) -> dict[str, Any] | None:
        """Ray's record of the job, or None when the dashboard is busy."""
        try:
            return self.head.request("GET", f"/api/jobs/{self.submission_id}")
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise ClusterError(f"the local cluster knows no job {self.submission_id}") from error
        except OSError as error:
            if process_of(self.head) is None:
                raise ClusterError("the local cluster ended before the job; run the same command again") from error
        return None

    def _copy_log(self, out: IO[str]) -> None:
        """Copy what the job's log gained, less the lines that Ray puts in front."""
        # The head runs on this machine, so its log file is at hand: Ray's own tail ends six seconds after the job.
        path = ray_dir(self.head.temp_dir) / "session_latest" / "logs" / f"job-driver-{self.submission_id}.log"
        if self._log is None:
            try:
                self._log = path.open("rb")
            except OSError:
                return
        text = self._decoder.decode(self._log.read())  # the file may end within a character
        if self._preface is not None:
            self._preface += text
            _, _, rest = self._preface.partition("Running entrypoint for job ")
            if "\n" not in rest:
                return
            text, self._preface = rest.split("\n", 1)[1], None
        if text:
            out.write(text)
            out.flush()


def _run(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Exit status and output of a command; in a session of its own, since Ctrl-C is ours to handle."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate()
    except BaseException:
        process.kill()
        process.wait()
        raise
    return process.returncode, output


def running_jobs(head: Head) -> dict[str, str]:
    """Submission id -> entrypoint of every submitted job that has not ended.

    Raises:
        ClusterError: the cluster does not answer.
    """
    return {job["submission_id"]: job["entrypoint"] for job in _jobs(head) if job["status"] in ("PENDING", "RUNNING")}


def all_jobs(head: Head) -> set[str]:
    """Submission ids of every submitted job that the cluster remembers; raises as `running_jobs` does."""
    return {job["submission_id"] for job in _jobs(head)}


def _jobs(head: Head) -> list[dict[str, Any]]:
    try:
        jobs = head.request("GET", "/api/jobs/")
    except OSError as error:
        raise ClusterError(f"the local cluster does not answer ({error}); `make stop`, then run this again") from error
    return [job for job in jobs if job["type"] == "SUBMISSION"]


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does for the duration."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
