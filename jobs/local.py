"""The pipeline on this machine: a local Ray cluster, jobs submitted to it, and the MLflow server. `make` calls this.

    python -m jobs.local run quickstart --storage storage --train.steps 50    # starts the cluster, submits, follows
    python -m jobs.local status                                              # what runs
    eval "$(python -m jobs.local env)"                                       # then plain `ray job submit` talks to it
    python -m jobs.local ui                                                  # the MLflow server, until Ctrl-C
    python -m jobs.local stop                                                # ends the cluster and the endpoint

The exit status of `run` is the job's: 0, 1 for a failure, 2 for something that the user can mend; 130 after Ctrl-C.
"""

import argparse
import contextlib
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from jobs import command
from kraken.config import ConfigError, RunConfig
from kraken.environment import provide_home
from kraken.manifest import git_revision
from pipelines import local_cluster, local_head, local_jobs
from pipelines.errors import ClusterError
from pipelines.local_head import Head
from pipelines.local_jobs import Job
from pipelines.outbox import without_password
from pipelines.tracking import Tracker
from pipelines.tracking_server import TrackingServer, runs_page, tracking_uri, ui_command

CHECKOUT = Path(__file__).resolve().parent.parent
CODE = ("kraken", "pipelines", "jobs", "serve", "benchmarks")
"""Folders that are uploaded with a job. The rest of the checkout stays."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.local", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        (
            "run",
            "start the cluster unless it runs, submit the pipeline and follow it; other options go to the pipeline",
        ),
        ("stop", "end the cluster, its jobs and the endpoint"),
        ("status", "say what runs"),
        ("env", "print the shell lines that point `ray job submit` at the cluster"),
        ("ui", "run the MLflow server on loopback until Ctrl-C"),
    ):
        subparser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        subparser.add_argument("--storage", default="storage", help="folder or URI that holds every artefact (storage)")
        if name == "run":
            subparser.add_argument("preset", help="which run, for example quickstart")
    args, overrides = parser.parse_known_args(argv)
    if overrides and args.command != "run":
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    provide_home()
    storage = args.storage if "://" in args.storage else os.path.abspath(args.storage)
    try:
        match args.command:
            case "run":
                return run(args.preset, storage, overrides)
            case "stop":
                return stop(storage)
            case "status":
                return status(storage)
            case "env":
                return env(storage)
            case _:
                return ui(storage)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def run(preset: str, storage: str, overrides: list[str]) -> int:
    """Submit the whole pipeline to the local cluster and follow it to its end."""
    arguments = [preset, "--storage", storage, *overrides]
    parsed = command.parse("python -m jobs.end_to_end", "", arguments)  # what is wrong shows before a cluster starts
    if parsed.dry_run:  # needs no cluster
        return subprocess.run(
            [sys.executable, "-m", "jobs.end_to_end", *arguments], cwd=CHECKOUT, check=False
        ).returncode
    tracking_uri(parsed.config.storage)
    if not local_cluster.is_recorded(storage):  # else the port may be held by the endpoint of the recorded cluster
        local_cluster.require_bindable(parsed.config.serve)
    head = local_cluster.start(storage, say)
    status = submit(head, ["python", "-m", "jobs.end_to_end", *arguments], name=preset)
    if status != 0:
        end_stale_runs(head, parsed.config)
    return status


def end_stale_runs(head: Head, config: RunConfig) -> None:
    """End the MLflow runs of this cluster's jobs that died too fast to do it themselves, by SIGKILL or for lack of
    memory. What the server has of other clusters' jobs may be alive."""
    with contextlib.suppress(ConfigError):  # a tracking server that is away; the job has said so
        ended = local_jobs.all_jobs(head) - local_jobs.running_jobs(head).keys()
        tracker = Tracker(config.storage, config.experiment)
        for run_id in tracker.reconcile(lambda submission: "FAILED" if submission in ended else None):
            say(f"MLflow run {run_id} was left open and is marked as failed")


def submit(head: Head, entrypoint: list[str], *, name: str, working_dir: Path = CHECKOUT) -> int:
    """Submit a command by `ray job submit` and follow it; Ctrl-C and SIGTERM stop it.

    A command that already runs on the cluster is followed instead of being submitted twice.

    Returns:
        0 success, 2 the user's fault, 1 any other failure, 130 stopped from here.
    """
    line = shlex.join(entrypoint)
    others = local_jobs.running_jobs(head)
    same = [job_id for job_id, other in others.items() if other == line]
    job = Job(head, same[0] if same else f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    with local_jobs.sigterm_as_interrupt():
        try:
            if same:
                say(f"job {job.submission_id} does this already; following it")
            else:
                if others:
                    say(f"sharing the cluster with {', '.join(others)}")
                say(f"ray job submit --submission-id {job.submission_id} -- {line}")
                job.submit(
                    entrypoint,
                    working_dir=working_dir,
                    excludes=excludes(working_dir),
                    env_vars=job_environment(job.submission_id),
                )
            record = job.follow()
        except KeyboardInterrupt:
            say("stopping the job, which records how it ended; Ctrl-C again leaves it alone")
            job.stop()
            with contextlib.suppress(ClusterError):  # it may never have been accepted
                job.follow()
            return 130
    return exit_status(record)


def exit_status(record: dict[str, Any]) -> int:
    """Exit status for the record of a job that has ended. Prints the reason if the job could not print it itself."""
    code = record.get("driver_exit_code")
    if record["status"] == "SUCCEEDED":
        return 0
    if record["status"] == "STOPPED":
        print("error: the job was stopped; run the same command again to go on", file=sys.stderr)
    elif code is None:
        print(f"error: the job did not start: {record.get('message')}", file=sys.stderr)
    elif code < 0 or code > 128:
        number = -code if code < 0 else code - 128
        print(f"error: signal {number} ended the job; 9 is often a lack of memory", file=sys.stderr)
    return 2 if code == 2 else 1


def excludes(working_dir: Path) -> list[str]:
    """Patterns that leave only the code folders of a checkout; none for a folder that is no checkout."""
    code = [name for name in CODE if (working_dir / name).is_dir()]
    if not code:
        return []
    everything = ("/[!.]*", "/.?*")  # not "/*", which matches the folder itself
    return [*everything, *(f"!/{name}{rest}" for name in code for rest in ("", "/**")), "__pycache__"]


def job_environment(submission_id: str) -> dict[str, str]:
    """Variables that go with a job, since the cluster may be older than their values."""
    from pipelines.tracking import submitter

    variables = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "KRAKEN_API_KEY")}
    variables["KRAKEN_SUBMISSION"] = submission_id
    variables["KRAKEN_GIT_REVISION"] = git_revision()
    variables["KRAKEN_USER"] = submitter()
    return {name: value for name, value in variables.items() if value}


def stop(storage: str) -> int:
    """End what `run` started in this storage."""
    say("cluster stopped" if local_cluster.stop(storage, say) else f"no cluster runs for {storage}")
    return 0


def status(storage: str) -> int:
    """Say what runs, and how to talk to it."""
    if not (head := local_cluster.find(storage)):
        print(f"no cluster runs for {storage}; `make run` starts one")
        return 0
    print(f"cluster of {storage}: pid {head.pid}, {head.num_cpus} CPUs, dashboard {head.dashboard_url}")
    for job_id, line in local_jobs.running_jobs(head).items():
        print(f"job {job_id}: {line}")
    print(f"for `ray job submit`:\n{local_cluster.exports(head)}")
    return 0


def env(storage: str) -> int:
    """Print shell lines only, for `eval`."""
    if not (head := local_cluster.find(storage)):
        raise ConfigError(f"no cluster runs for storage={storage}; start one with `make run`, or give its --storage")
    print(local_cluster.exports(head))
    return 0


def ui(storage: str) -> int:
    """Run the MLflow server of this storage until Ctrl-C."""
    uri = tracking_uri(storage)
    if uri.startswith("http"):
        say(f"MLflow runs at {without_password(uri)}")
        if answers(f"{uri.rstrip('/')}/health"):
            say_runs(storage, uri)
        return 0
    port = next((port for port in range(5000, 5100) if is_free(port)), None) or local_cluster.free_port()
    url = f"http://127.0.0.1:{port}"
    # The server's job runner serves features that this project does not use, and needs as much memory as the server.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    say(f"starting MLflow on {url}")
    with local_jobs.sigterm_as_interrupt(), subprocess.Popen(ui_command(storage, port), env=environment) as server:
        try:
            while server.poll() is None and not answers(f"{url}/health"):
                time.sleep(0.3)
            if server.poll() is None:
                say(f"open {url}   (Ctrl-C ends it)")
                say_runs(storage, url)
            return 1 if server.wait() else 0
        except KeyboardInterrupt:
            local_head.end_tree(server.pid)
            return 0


def say_runs(storage: str, url: str) -> None:
    """Say where the UI of a server lists the runs of pipelines, a line for each experiment."""
    for name, experiment_id in TrackingServer(storage).experiments():
        say(f"runs of experiment {name}: {runs_page(url, experiment_id)}")


def is_free(port: int) -> bool:
    """Whether a server can listen on this port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as the server does: an old connection is no obstacle
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def answers(url: str) -> bool:
    """Whether a GET of this loopback URL succeeds."""
    try:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5).close()
    except OSError:
        return False
    return True


def say(message: str) -> None:
    """A line of our own, among the job's."""
    print(f"local: {message}", flush=True)


if __name__ == "__main__":
    with command.quiet_without_reader():
        sys.exit(main())
