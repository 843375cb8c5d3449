"""Measure perplexity and parity through the engine.

ray job submit --working-dir . -- python -m jobs.evaluate quickstart --storage /shared/kraken
python -m jobs.evaluate quickstart --train.steps 50
python -m jobs.evaluate models:/kraken@champion --evaluate.max-windows 100
"""

from jobs.command import run_job
from jobs.stage import run_until
from pipelines.evaluate import STAGE

if __name__ == "__main__":
    run_job(lambda argv: run_until(STAGE, "Measure perplexity and parity through the engine.", argv))
