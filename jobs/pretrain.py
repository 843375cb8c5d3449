"""Train the model on Ray Train workers.

ray job submit --working-dir . -- python -m jobs.pretrain quickstart --storage /shared/kraken
python -m jobs.pretrain quickstart --train.steps 50
"""

from jobs.command import run_job
from jobs.stage import run_until
from pipelines.pretrain import STAGE

if __name__ == "__main__":
    run_job(lambda argv: run_until(STAGE, "Train the model on Ray Train workers.", argv))
