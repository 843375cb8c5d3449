"""Convert the newest checkpoint to the exchange format.

ray job submit --working-dir . -- python -m jobs.convert quickstart --storage /shared/kraken
python -m jobs.convert quickstart --train.steps 50
"""

from jobs.command import run_job
from jobs.stage import run_until
from pipelines.convert import STAGE

if __name__ == "__main__":
    run_job(lambda argv: run_until(STAGE, "Convert the newest checkpoint to the exchange format.", argv))
