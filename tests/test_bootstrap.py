"""The set-up script: what it reads from the pins, and how it explains a failure. It installs nothing here."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import bootstrap

ROOT = Path(__file__).resolve().parent.parent


def test_every_requirement_is_pinned_exactly() -> None:
    pins, cuda_pins = bootstrap.read_pins()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+( ; .*)?", pin) for pin in pins + cuda_pins)
    names = {bootstrap.name_of(pin) for pin in pins}
    project = tomllib.loads(bootstrap.PYPROJECT.read_text())["project"]
    asked = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    assert {bootstrap.name_of(requirement) for requirement in asked} - {"kraken-pipeline"} <= names
    assert "torch==2.13.0" in pins
    assert {"triton", "nvidia-nccl-cu13"} <= {bootstrap.name_of(pin) for pin in cuda_pins}


def test_shares_hold_every_package_once_and_cost_about_the_same() -> None:
    pins, _ = bootstrap.read_pins()
    shares = bootstrap.balance(pins, 3)
    assert sorted(pin for share in shares for pin in share) == sorted(pins)
    costs = [sum(bootstrap.COST.get(bootstrap.name_of(pin), 1) for pin in share) for share in shares]
    assert max(costs) - min(costs) <= 2


def test_costs_name_pinned_packages() -> None:
    pins, _ = bootstrap.read_pins()
    assert set(bootstrap.COST) <= {bootstrap.name_of(pin) for pin in pins}


@pytest.mark.parametrize(
    ("output", "hint"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "is full"),
        (
            "WARNING: Retrying ... NewConnectionError ...\nERROR: No matching distribution found for torch",
            "PIP_INDEX_URL",
        ),
        ("ERROR: No matching distribution found for torch==2.13.0", "the package index has no torch==2.13.0"),
        ("Error: ensurepip is not available", "venv package"),
        ("ERROR: something new\nmore of it", "something new"),
        ("", "no output"),
    ],
)
def test_a_failure_is_one_line(output: str, hint: str) -> None:
    line = bootstrap.explain(output, "pip")
    assert hint in line
    assert "\n" not in line


@pytest.mark.parametrize("name", ["with space", "a'b", "a[b]", "a$b"])
def test_a_checkout_that_ray_cannot_run_in_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    checkout = tmp_path / name
    checkout.mkdir()
    for file in ("bootstrap.py", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / file, checkout)
    command = [sys.executable, "bootstrap.py"]
    result = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False, timeout=10)
    assert result.returncode == 1
    assert re.fullmatch(
        r"error: the path of this checkout, .* holds .*; move the checkout to a path of .*\n", result.stderr
    )
    assert not (checkout / ".venv").exists()


def test_ordinary_paths_are_accepted() -> None:
    for path in ("/home/me/kraken", "/srv/k-1.0_b/x+y@z", "/home/jürgen/kraken", "/a=b/#c/100%"):
        bootstrap.require_usable_path(Path(path))


def test_make_refuses_a_wrong_python_in_one_line() -> None:
    result = subprocess.run(["make", "setup", "PYTHON=false"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    [line, of_make] = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and "make PYTHON=" in line
    assert of_make.startswith("make")


def test_make_help_lists_the_targets() -> None:
    result = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("run", "stop", "ui", "test", "check"):
        assert f"  {target} " in result.stdout


def test_the_environment_of_these_tests_is_the_pinned_one() -> None:
    if Path(sys.prefix) != bootstrap.VENV:
        pytest.skip("not run by make")
    assert bootstrap.is_ready(bootstrap.fingerprint())
