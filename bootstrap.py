"""Build the environment in .venv from constraints.txt, or do nothing where it is already there.

    python3.11 bootstrap.py            # what every target of the Makefile does first
    python3.11 bootstrap.py lock       # write constraints.txt anew, after a change in pyproject.toml (minutes)

Standard library only. pip's own settings (PIP_* variables, pip.conf) choose the package index. The pins are complete,
so nothing has to be resolved: several pips install one share each, in a third of the time of one that resolves.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
CONSTRAINTS = ROOT / "constraints.txt"
PYPROJECT = ROOT / "pyproject.toml"
MARKER = VENV / "made-by-bootstrap"
"""Says that the folder is ours to replace; it holds the hash of what was installed once everything is."""
LOGS = VENV / "logs"
TEMPORARY = VENV / "tmp"
"""For pip's downloads: on the disk whose space was checked, and gone with an environment that is made anew."""

SUPPORTED = ((3, 11), (3, 12))
NEEDED_BYTES = 4 * 2**30
"""Free disk space to start with: the environment takes 2.3 GB beside the downloads."""

CUDA_HEADING = "# Only for a CUDA build of torch"
# fmt: off
COST = {
    "torch": 55, "ray": 25, "scipy": 14, "pandas": 14, "mlflow": 14, "pyarrow": 12, "sympy": 10, "numpy": 10,
    "scikit-learn": 10, "openai": 8, "mypy": 8, "matplotlib": 6, "grpcio": 6, "fonttools": 5, "sqlalchemy": 5,
    "networkx": 5, "databricks-sdk": 4, "cryptography": 4, "pillow": 4, "aiohttp": 4, "ruff": 3, "hf-xet": 3,
}
# fmt: on
"""What installing a package costs, roughly, where an ordinary one costs 1; it only balances the shares."""

WARM_UP = (
    "import torch, torch.distributed, tiktoken, rustbpe, safetensors.torch, dacite, tyro, mlflow.tracking, datasets",
    "import ray.scripts.scripts, ray.dashboard.head, ray.dashboard.agent, fastapi, ray.serve, ray.train.torch",
)
"""Imports that prove the environment and write the bytecode of what every process will load. One process each, in an
order that compiles little twice."""

NETWORK_WORDS = re.compile(
    r"NewConnectionError|ConnectTimeout|ReadTimeout|Name or service not known|name resolution|Network is unreachable"
    r"|Connection refused|Connection reset|ProxyError|SSLError|timed out|Max retries exceeded|RemoteDisconnected"
    r"|\b(?:40[137]|50[0234]) (?:Client|Server) Error"
)


UNUSABLE = re.compile(r"[\s'\"\\$`&|;<>()\[\]{}*?]")
"""Characters that the checkout's path must not hold: Ray starts its processes by shell command lines in which it does
not quote the path of Python, and pip reads brackets as extras."""


class SetUpError(Exception):
    """Why there is no environment, in one line with the way out."""


# The phases


def main() -> int:
    """Build or reuse the environment; the exit status is 0, 1 after an error or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=("install", "lock"), default="install")
    command = parser.parse_args().command
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that pip ends with us
    try:
        require_python()
        require_usable_path(ROOT)
        with only_one():
            lock() if command == "lock" else install()
    except SetUpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again, it starts the installation anew", file=sys.stderr)
        return 130
    return 0


def install() -> None:
    """Make .venv hold exactly the pins, unless it already does."""
    wanted = fingerprint()
    if is_ready(wanted):
        return
    started_at = time.monotonic()
    require_ours()
    require_disk()
    pins, cuda_pins = read_pins()
    version = ".".join(map(str, sys.version_info[:3]))
    say(started_at, f"making .venv with Python {version}; {len(pins)} packages follow, a minute or two in all")
    make_venv(wanted)
    say(started_at, "asking the package index")
    tools = [pin for pin in pins if name_of(pin) in ("pip", "setuptools")]  # a new pip takes half of an old one's time
    run_pips([pip_install("--retries", "1", "--timeout", "20", *tools)], started_at)
    say(started_at, "installing the packages")
    rest = [pin for pin in pins if pin not in tools]
    run_pips([pip_install(*share) for share in balance(rest, max(2, min(4, os.cpu_count() or 2)))], started_at)
    if required_by_torch() & {name_of(pin) for pin in cuda_pins}:
        say(started_at, "the index holds torch's CUDA build: installing its libraries too, several GB")
        run_pips([pip_install(*share) for share in balance(cuda_pins, 2)], started_at)
    say(started_at, "checking that everything fits and imports")
    check(started_at)
    shutil.rmtree(TEMPORARY)
    MARKER.write_text(f"{wanted}\n")
    say(started_at, ".venv is ready")


def require_python() -> None:
    """Refuse a Python that the pins are not made for."""
    if sys.version_info[:2] not in SUPPORTED:
        found = ".".join(map(str, sys.version_info[:3]))
        raise SetUpError(
            f"this is Python {found}, and Kraken needs 3.11 or 3.12; try `make PYTHON=/path/to/python3.12`"
        )


def require_usable_path(root: Path) -> None:
    """Refuse a checkout from whose path Ray could not start a process, before minutes of installation."""
    if found := UNUSABLE.search(str(root)):
        raise SetUpError(
            f"the path of this checkout, {root}, holds {found[0]!r}, at which Ray's command lines break; move the "
            "checkout to a path of letters, digits, '-', '_', '.' and '/'"
        )


def require_ours() -> None:
    """Refuse to replace a .venv that somebody else made."""
    if VENV.exists() and not MARKER.exists():
        raise SetUpError(f"{VENV} is there and was not made by this script; move it away, then run this again")


def require_disk() -> None:
    """Refuse to start what a nearly full disk cannot finish; an old .venv counts as free, since it is replaced."""
    free = shutil.disk_usage(ROOT).free
    if free < NEEDED_BYTES and VENV.exists():
        shutil.rmtree(VENV)
        free = shutil.disk_usage(ROOT).free
    if free < NEEDED_BYTES:
        raise SetUpError(
            f"{ROOT} has {free / 2**30:.1f} GB of disk space left, the environment needs {NEEDED_BYTES >> 30} GB; "
            "free some, or move the checkout to another disk"
        )


def make_venv(wanted: str) -> None:
    """An empty environment, marked as unfinished."""
    shutil.rmtree(VENV, ignore_errors=True)
    try:
        LOGS.mkdir(parents=True)
        TEMPORARY.mkdir()
        MARKER.write_text(f"unfinished {wanted}\n")
    except OSError as error:
        raise SetUpError(f"{VENV} cannot be written ({error.strerror}); make the checkout writable") from error
    result = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SetUpError(explain(result.stdout + result.stderr, "python -m venv"))


def check(started_at: float) -> None:
    """Install this checkout in editable mode, hold the dependencies against each other, import the large ones."""
    warm_ups = [
        subprocess.Popen(
            [PYTHON, "-c", code],
            cwd=VENV,
            env=clean_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for code in WARM_UP
    ]
    try:
        editable = [*pip_install("--no-build-isolation"), "--editable", str(ROOT)]
        run_pips([editable], started_at)
        run_pips([[str(PYTHON), "-m", "pip", "check", "--disable-pip-version-check"]], started_at)
        for process in warm_ups:
            _, output = process.communicate()
            if process.returncode != 0:
                raise SetUpError(f"the installed packages do not import: {last_line(output)}")
    finally:
        stop(warm_ups)


# pip


def pip_install(*arguments: str) -> list[str]:
    """A pip command. Bytecode is not compiled here: of 20,000 modules a run imports 4,000, see `WARM_UP`."""
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--no-input"]
    return [*command, "--disable-pip-version-check", "--no-warn-script-location", *arguments]


def run_pips(commands: list[list[str]], started_at: float) -> None:
    """Run pip commands side by side; the first failure ends the others.

    Raises:
        SetUpError: what pip's output means.
    """
    logs = [LOGS / f"pip-{time.monotonic_ns()}-{index}.log" for index in range(len(commands))]
    processes: list[subprocess.Popen[str]] = []
    try:
        for command, log in zip(commands, logs, strict=True):
            with log.open("w") as file:
                processes.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=clean_environment(), stdout=file, stderr=subprocess.STDOUT, text=True
                    )
                )
        said_at = time.monotonic()
        while any(process.poll() is None for process in processes):
            for process, log in zip(processes, logs, strict=True):
                if process.poll():
                    raise SetUpError(explain(log.read_text(errors="replace"), "pip", log))
            if time.monotonic() - said_at > 20:
                said_at = time.monotonic()
                num_packages = sum(1 for _ in VENV.glob("lib/python*/site-packages/*.dist-info"))
                say(started_at, f"{num_packages} packages unpacked" if num_packages > 9 else "still downloading")
            time.sleep(0.1)
        for process, log in zip(processes, logs, strict=True):
            if process.returncode != 0:
                raise SetUpError(explain(log.read_text(errors="replace"), "pip", log))
    finally:
        stop(processes)


def explain(output: str, tool: str, log: Path | None = None) -> str:
    """One line for what a tool printed before it failed."""
    where = f" (all of its output: {log})" if log else ""
    if "No space left on device" in output or "Errno 28" in output:
        return "the disk is full; free space, or set TMPDIR to a larger disk's folder, then run the same command again"
    if "ensurepip is not available" in output:
        return "this Python has no ensurepip; install its venv package (Debian: python3-venv), or give another PYTHON="
    if NETWORK_WORDS.search(output):
        return (
            "the package index cannot be reached; check the network, or set PIP_INDEX_URL to an index that this "
            f"machine reaches, then run the same command again{where}"
        )
    if match := re.search(r"No matching distribution found for (\S+)", output):
        return (
            f"the package index has no {match[1]} for this Python and platform; check PIP_INDEX_URL and "
            f"PIP_EXTRA_INDEX_URL, or try another PYTHON={where}"
        )
    errors = [line for line in output.splitlines() if line.startswith("ERROR:")]
    return f"{tool} failed: {errors[0].removeprefix('ERROR: ') if errors else last_line(output)}{where}"


def read_pins() -> tuple[list[str], list[str]]:
    """The pins of every machine, and those of torch's CUDA build."""
    common, _, cuda = CONSTRAINTS.read_text().partition(CUDA_HEADING)
    lines = [[line.split("#")[0].strip() for line in part.splitlines()] for part in (common, cuda)]
    pins, cuda_pins = ([line for line in part if "==" in line] for part in lines)
    return pins, cuda_pins


def required_by_torch() -> set[str]:
    """Names of the packages that the installed torch asks for; the CPU build asks for no CUDA libraries."""
    [metadata] = VENV.glob("lib/python*/site-packages/torch-*.dist-info/METADATA")
    lines = metadata.read_text(errors="replace").split("\n\n")[0].splitlines()
    return {name_of(line.removeprefix("Requires-Dist: ")) for line in lines if line.startswith("Requires-Dist: ")}


def balance(pins: list[str], num_shares: int) -> list[list[str]]:
    """Deal packages out so that the shares cost about the same, the costly ones first."""
    shares: list[list[str]] = [[] for _ in range(num_shares)]
    costs = [0] * num_shares
    for pin in sorted(pins, key=lambda pin: COST.get(name_of(pin), 1), reverse=True):
        cheapest = costs.index(min(costs))
        shares[cheapest].append(pin)
        costs[cheapest] += COST.get(name_of(pin), 1)
    return shares


def name_of(requirement: str) -> str:
    """The package's normalised name."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
    return re.sub(r"[-_.]+", "-", match[0]).lower() if match else ""


# Whether the environment is there


def fingerprint() -> str:
    """Hash of what determines the environment; its place too, since an environment cannot be moved."""
    settings = tomllib.loads(PYPROJECT.read_text())
    package = [settings["build-system"], settings["project"], settings["tool"]["setuptools"]]  # not the linters' tables
    parts = [CONSTRAINTS.read_bytes(), json.dumps(package, sort_keys=True).encode(), str(VENV).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def is_ready(wanted: str) -> bool:
    """Whether a finished environment of these pins is there, and its Python runs and is the one asked for, if any."""
    if not MARKER.is_file() or MARKER.read_text().strip() != wanted:
        return False
    try:
        code = "import sys; print(*sys.version_info[:2])"
        result = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return False
    version = "{} {}".format(*sys.version_info[:2])
    return result.returncode == 0 and (result.stdout.strip() == version or not os.environ.get("KRAKEN_PYTHON_GIVEN"))


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """Hold this checkout's lock, so that two `make` at once do not build into the same folder."""
    with Path(__file__).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another make is setting up this checkout; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# constraints.txt


def lock() -> None:
    """Resolve `.[all]` with every supported Python found here and write the versions to constraints.txt.

    Versions already pinned stay; delete a line, or the file, to let pip choose. Where pip finds a CPU build of torch,
    the pins of its CUDA build can only come from the other Python or from the file as it was, so they are kept.
    """
    header = HEADER.rstrip()
    found: dict[str, dict[str, str]] = {}
    for version in SUPPORTED:
        label = ".".join(map(str, version))
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            make = [
                [f"python{label}", "-m", "venv", folder],
                [f"{folder}/bin/python", "-m", "pip", "install", "--upgrade", "-q", "pip"],
            ]
            keep = ["--constraint", str(CONSTRAINTS)] if CONSTRAINTS.exists() else []
            options = ["--dry-run", "--ignore-installed", "--quiet", "--report", str(report), *keep]
            resolve = [f"{folder}/bin/python", "-m", "pip", "install", *options, f"{ROOT}[all]", "pip", "setuptools"]
            for command in (*make, resolve):
                try:
                    result = subprocess.run(command, capture_output=True, text=True, check=False)
                except OSError as error:
                    raise SetUpError(f"python{label} is needed to lock and was not found ({error.strerror})") from error
                if result.returncode != 0:
                    raise SetUpError(f"python{label}: {explain(result.stdout + result.stderr, 'pip')}")
            items = [item["metadata"] for item in json.loads(report.read_text())["install"]]
        found[label] = {name_of(item["name"]): item["version"].split("+")[0] for item in items}
        found[label].pop("kraken-pipeline")
        print(f"Python {label}: {len(found[label])} packages", flush=True)
    _, old_cuda = read_pins() if CONSTRAINTS.exists() else ([], [])
    is_cuda = re.compile(r"nvidia-|cuda-|triton$")
    pins, cuda_pins = [], {name_of(pin): pin for pin in old_cuda}
    for name in sorted(set().union(*found.values())):
        versions = {label: packages[name] for label, packages in found.items() if name in packages}
        if is_cuda.match(name):
            cuda_pins[name] = f"{name}=={next(iter(versions.values()))}"
        elif len(set(versions.values())) == 1 and len(versions) == len(SUPPORTED):
            pins.append(f"{name}=={versions[label]}")
        else:
            pins += [f'{name}=={version} ; python_version == "{label}"' for label, version in versions.items()]
    text = "\n".join([header, "", *pins, "", CUDA_HEADING, *(cuda_pins[name] for name in sorted(cuda_pins)), ""])
    CONSTRAINTS.write_text(text)


HEADER = """\
# Every package of the environment, exactly, for Python 3.11 and 3.12 on Linux: what pyproject.toml asks for with all of
# its extras, and all that these pull in. `make` installs from it; by hand: pip install -c constraints.txt -e .[all]
#
# After a change in pyproject.toml: python3.11 bootstrap.py lock   (needs both Pythons and a package index)
# To move to newer versions, delete their lines, or all of them, first. torch stays exact: where an index holds a CPU
# build of this version only, a looser pin downloads several GB of CUDA packages instead.
"""


# Small things


def say(started_at: float, message: str) -> None:
    """A line of progress with the seconds since the start."""
    print(f"[{time.monotonic() - started_at:4.0f} s] {message}", flush=True)


def clean_environment() -> dict[str, str]:
    """This process's environment, with bytecode written, no other Python's modules in sight, and room for downloads."""
    strange = ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX")
    kept = {name: value for name, value in os.environ.items() if name not in strange}
    return {**kept, "TMPDIR": str(TEMPORARY)}


def stop(processes: list[subprocess.Popen[str]]) -> None:
    """End what is still running and wait for it."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    for process in processes:
        process.wait()
        if process.stderr:
            process.stderr.close()


def last_line(output: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


if __name__ == "__main__":
    sys.exit(main())
