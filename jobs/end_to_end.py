"""The whole pipeline, from text to a served model:

ray job submit --working-dir . -- python -m jobs.end_to_end quickstart --storage /shared/kraken
python -m jobs.end_to_end quickstart --train.steps 50 --dry-run
"""

from jobs.command import parse, run_job
from pipelines import end_to_end, needs, summary


def main(argv: list[str]) -> None:
    arguments = parse("python -m jobs.end_to_end", "Prepare, pretrain, convert, evaluate and deploy.", argv)
    if arguments.dry_run:
        print(needs.describe_plan(arguments.config, end_to_end.plan(arguments.config)))
        return
    results = end_to_end.run_and_advise(arguments.config)
    facts = summary.summarise(arguments.config, results)
    summary.write(arguments.config, facts)
    print(summary.render(arguments.config, facts))


if __name__ == "__main__":
    run_job(main)
