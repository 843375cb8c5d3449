"""Check on this machine that TensorRT-LLM is what this project assumes, and that it computes what it should.

python -m jobs.doctor tensorrt_llm
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from jobs.command import FAILURE, USER_ERROR, LineParser, run_job
from kraken.choose_engine import find_machine

DESCRIPTION = """Check on this machine that TensorRT-LLM is what this project assumes, and that it computes what it
should: signatures, conversion, logits and greedy tokens against our own model, serving through Ray Serve, time to first
token. Exit status: 0 when all passes, 1 when something fails, 2 when something is not possible here."""


def main(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    machine = find_machine()
    print(f"TensorRT-LLM: {machine.version or machine.problem}", flush=True)
    from kraken.trtllm.doctor import Check, Patient, examine, fitting_width, why_no_width

    patient = Patient(num_timed=options.num_timed)
    folder = Path(tempfile.mkdtemp(prefix="kraken-doctor-", dir=options.scratch))
    checks: list[Check] = []

    def show(check: Check) -> None:
        checks.append(check)
        print(f"  {check.name:26} {check.outcome:18} {check.detail}", flush=True)

    try:
        for check in examine(machine, folder, patient):
            show(check)
        if machine.version is None or fitting_width(machine) is None:
            reason = machine.problem if machine.version is None else why_no_width(machine)
            show(Check("Ray Serve", "not possible here", reason))
        else:
            from pipelines.doctor import examine_serving

            for check in examine_serving(folder / "kraken", patient):
                show(check)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    outcomes = [check.outcome for check in checks]
    print(", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in ("pass", "fail", "not possible here")))
    if "fail" in outcomes:
        sys.exit(FAILURE)
    if "not possible here" in outcomes:
        sys.exit(USER_ERROR)


def _parser() -> argparse.ArgumentParser:
    parser = LineParser(prog="python -m jobs.doctor", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("what", choices=["tensorrt_llm"], help="what to check")
    parser.add_argument("--num-timed", type=int, default=20, help="requests per measured time (20)")
    parser.add_argument("--scratch", metavar="FOLDER", help="where models are made; about 3 GB (the system's)")
    return parser


if __name__ == "__main__":
    run_job(main)
