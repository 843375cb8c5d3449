"""Check on this machine that TensorRT-LLM is what this project assumes, and that it computes what it should.

python -m jobs.doctor tensorrt_llm
"""

import argparse
import shutil
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path

from jobs.command import FAILURE, USER_ERROR, LineParser, run_job
from kraken.choose_engine import find_machine
from kraken.config import ConfigError

DESCRIPTION = """Check on this machine that TensorRT-LLM is what this project assumes, and that it computes what it
should: signatures, conversion, logits, tokens, seeds, clean-up, serving through Ray Serve, time
to first token. It takes less than ten minutes on two GPUs and writes a report. Exit status: 0 when all passes, 1 when
something fails, 2 when something is not possible here."""


def main(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    report = Path(options.report)
    if not report.parent.is_dir():
        raise ConfigError(f"--report {report}: there is no folder {report.parent}; make it, or name another file")
    started_at = time.monotonic()
    machine = find_machine()
    print(f"TensorRT-LLM: {machine.version or machine.problem}", flush=True)
    from kraken.trtllm.doctor import Check, Patient, examine, write_report
    from pipelines.doctor import examine_serving

    patient = Patient(num_timed=options.num_timed)
    folder = Path(tempfile.mkdtemp(prefix="kraken-doctor-", dir=options.scratch))
    checks: list[Check] = []
    try:
        for check in chain(examine(machine, folder, patient), examine_serving(machine, folder / "kraken", patient)):
            checks.append(check)
            print(f"  {check.name:26} {check.outcome:18} {check.found}", flush=True)
            if check.outcome == "fail":
                print(f"  {'':26} expected: {check.expected}\n  {'':26} to do: {check.to_do}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        write_report(report, machine, checks, patient, time.monotonic() - started_at)
    outcomes = [check.outcome for check in checks]
    print(", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in ("pass", "fail", "not possible here")))
    print(f"report: {report}")
    if "fail" in outcomes:
        sys.exit(FAILURE)
    if "not possible here" in outcomes:
        sys.exit(USER_ERROR)


def _parser() -> argparse.ArgumentParser:
    parser = LineParser(prog="python -m jobs.doctor", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("what", choices=["tensorrt_llm"], help="what to check")
    parser.add_argument("--num-timed", type=int, default=20, help="requests per measured time (20)")
    parser.add_argument("--scratch", metavar="FOLDER", help="where models are made; about 3 GB (the system's)")
    parser.add_argument(
        "--report", metavar="FILE", default="tensorrt_llm_report.json", help="JSON, to be attached to an issue"
    )
    return parser


if __name__ == "__main__":
    run_job(main)
