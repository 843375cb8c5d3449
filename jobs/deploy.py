"""Serve the converted model behind an OpenAI-compatible endpoint.

ray job submit --working-dir . -- python -m jobs.deploy quickstart --storage /shared/kraken
python -m jobs.deploy quickstart --train.steps 50
python -m jobs.deploy models:/kraken/7            # a registered version again, through the gates
"""

from jobs.command import run_job
from jobs.stage import run_until
from pipelines.deploy import STAGE

if __name__ == "__main__":
    run_job(lambda argv: run_until(STAGE, "Serve the converted model behind an OpenAI-compatible endpoint.", argv))
