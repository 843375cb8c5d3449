"""Train the tokenizer and write the token shards.

ray job submit --working-dir . -- python -m jobs.prepare quickstart --storage /shared/kraken
python -m jobs.prepare quickstart --train.steps 50
"""

from jobs.command import run_job
from jobs.stage import run_until
from pipelines.prepare import STAGE

if __name__ == "__main__":
    run_job(lambda argv: run_until(STAGE, "Train the tokenizer and write the token shards.", argv))
