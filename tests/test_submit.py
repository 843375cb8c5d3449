"""Submitting to a cluster by its dashboard: what travels with a job, and what the job then knows."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import submit
from kraken.config import ConfigError
from kraken.manifest import git_revision
from pipelines.errors import ClusterError

PROBE = """
import json, os, pathlib, sys
import ray
from pipelines.tracking import submitter
from pipelines.lease import submission
ray.init(log_to_driver=False)
by_variable = submission()
os.environ.pop("KRAKEN_SUBMISSION", None)
files = sorted(str(path) for path in pathlib.Path().rglob("*") if path.suffix != ".pyc" and path.is_file())
facts = {"by_variable": by_variable, "by_ray": submission(), "user": submitter(), "files": files}
print("facts " + json.dumps(facts | {"git": os.environ.get("KRAKEN_GIT_REVISION")}), flush=True)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder like a checkout, with one small job."""
    for name in (".git", "storage", "jobs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "probe.py").write_text(PROBE)
    (tmp_path / "notes.txt").write_text("stays here")
    return tmp_path


@pytest.mark.slow  # the shared cluster sometimes has no job agent left after other tests
@pytest.mark.ray
def test_a_job_knows_its_commit_its_user_and_its_own_name(
    ray_cluster: str, checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import ray

    dashboard = ray._private.worker._global_node.address_info["webui_url"]  # type: ignore[attr-defined]
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://{dashboard}")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("KRAKEN_USER", "ada")
    monkeypatch.setenv("KRAKEN_API_KEY", "not-to-be-shown")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:not-to-be-shown@tracking:5000")
    for status in (0, 2):
        entrypoint = [sys.executable, "jobs/probe.py", str(status)]
        assert submit.submit(entrypoint, name="probe", working_dir=checkout) == status
        if status == 0:
            output = capfd.readouterr().out
    assert "not-to-be-shown" not in output
    assert f"jobs/ (1 files), 0.0 MB; nothing else of {checkout}" in output
    facts = json.loads(output.split("facts ", 1)[1].splitlines()[0])
    assert facts["files"] == ["jobs/probe.py"]
    assert (facts["user"], facts["git"]) == ("ada", git_revision())
    assert facts["by_variable"] == facts["by_ray"] and facts["by_ray"].startswith("probe-")
    assert f"ray job logs {facts['by_ray']} --follow" in output


def test_what_is_wrong_shows_before_anything_is_uploaded(
    monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]
) -> None:
    monkeypatch.delenv("KRAKEN_STORAGE", raising=False)
    for name in submit.ADDRESS_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="RAY_API_SERVER_ADDRESS is not set"):
        submit.main(["quickstart", "--storage", "/shared/kraken"])
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ConfigError, match="storage=storage is relative"):
        submit.main(["quickstart"])
    with pytest.raises(ConfigError, match="unknown setting"):
        submit.main(["quickstart", "--storage", "/shared/kraken", "--train.stepz", "3"])
    with pytest.raises(ClusterError, match="did not take the job"):
        submit.main(["quickstart", "--storage", "/shared/kraken"])


def test_the_documented_ray_command_gives_valid_json() -> None:
    """As the shell makes it, with its substitutions."""
    readme = (submit.CHECKOUT / "README.md").read_text()
    words = readme.split("--runtime-env-json ", 1)[1].split(" \\\n", 1)[0]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": "http://mlflow:5000"}
    command = ["bash", "-c", f"echo {words}"]
    made = subprocess.check_output(command, cwd=submit.CHECKOUT, env=environment, text=True)
    runtime_env = json.loads(made)
    assert ".git" in runtime_env["excludes"]
    assert runtime_env["env_vars"]["KRAKEN_GIT_REVISION"] == git_revision()
    assert runtime_env["env_vars"]["KRAKEN_USER"]


def test_a_cluster_that_has_no_agent_yet_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        """A dashboard whose agent comes after two refusals; then it refuses for another reason."""

        def __init__(self) -> None:
            self.refusals = ["No available agent to submit job, please try again later."] * 2
            self.accepted: list[dict[str, str]] = []

        def submit_job(self, **job: str) -> None:
            if self.refusals:
                raise RuntimeError(f"Request failed with status code 500: {self.refusals.pop()}")
            self.accepted.append(job)

    monkeypatch.setattr(submit, "AGENT_POLL_S", 0.0)
    client = Client()
    submit._submit_when_an_agent_is_there(client, {"entrypoint": "true"})  # type: ignore[arg-type]
    assert client.accepted == [{"entrypoint": "true"}]
    client.refusals.append("the runtime environment is broken")
    with pytest.raises(RuntimeError, match="runtime environment is broken"):
        submit._submit_when_an_agent_is_there(client, {})  # type: ignore[arg-type]
    client.refusals.append("No available agent to submit job")
    monkeypatch.setattr(submit, "AGENT_LIMIT_S", -1.0)
    with pytest.raises(RuntimeError, match="No available agent"):
        submit._submit_when_an_agent_is_there(client, {})  # type: ignore[arg-type]
