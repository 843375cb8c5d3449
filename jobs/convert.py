"""Convert the newest checkpoint to the exchange format, a published checkpoint to and from it, a folder that
transformers saved to it, or a converted model to what TensorRT-LLM reads.

ray job submit --working-dir . -- python -m jobs.convert quickstart --storage /shared/kraken
python -m jobs.convert quickstart --train.steps 50
python -m jobs.convert --from-published ckpt.pt --out FOLDER [--tokenizer gpt2|FOLDER]
python -m jobs.convert --to-published FOLDER|models:/NAME@ALIAS --out ckpt.pt
python -m jobs.convert --from-huggingface FOLDER --out FOLDER [--tokenizer gpt2|FOLDER]
python -m jobs.convert --to-tensorrt-llm FOLDER --out FOLDER
"""

import argparse
import os
from pathlib import Path

from jobs.command import LineParser, absolute_storage, default_storage, run_job
from jobs.stage import run_until
from kraken.config import ConfigError
from kraken.storage import is_remote, local_artefact
from pipelines.convert import STAGE
from pipelines.registry import is_reference, model_folder

FOLDER_OPTIONS = ("--from-published", "--to-published", "--from-huggingface", "--to-tensorrt-llm")
DESCRIPTION = """Convert the newest checkpoint to the exchange format.

Checkpoints of the published code, folders of transformers and converted models, instead of a PRESET (--from-published
--help says more):
  python -m jobs.convert --from-published ckpt.pt --out FOLDER [--tokenizer gpt2|FOLDER]
  python -m jobs.convert --to-published FOLDER --out ckpt.pt
  python -m jobs.convert --from-huggingface FOLDER --out FOLDER [--tokenizer gpt2|FOLDER]
  python -m jobs.convert --to-tensorrt-llm FOLDER --out FOLDER"""


def main(argv: list[str]) -> None:
    if not {word.partition("=")[0] for word in argv} & set(FOLDER_OPTIONS):
        run_until(STAGE, DESCRIPTION, argv)
        return
    parser = _parser()
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        return
    options = parser.parse_args(argv)
    if options.from_published is not None:
        _import(
            _local("from-published", options.from_published), _local("out", options.out), options.tokenizer or "gpt2"
        )
    elif options.from_huggingface is not None:
        _import_saved(
            _local("from-huggingface", options.from_huggingface), _local("out", options.out), options.tokenizer
        )
    elif options.tokenizer is not None:
        raise ConfigError(
            "--tokenizer has no effect without --from-published or --from-huggingface: a converted model has its own, "
            "and the published code has none; leave it out"
        )
    elif options.to_tensorrt_llm is not None:
        _to_trtllm(_source("to-tensorrt-llm", options.to_tensorrt_llm), _local("out", options.out))
    else:
        _export(_source("to-published", options.to_published), _local("out", options.out))


def _parser() -> argparse.ArgumentParser:
    parser = LineParser(
        prog="python -m jobs.convert",
        description="Convert a checkpoint of the published code to an exchange folder or back, a folder that "
        "transformers saved to an exchange folder, or an exchange folder to what TensorRT-LLM reads.",
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--from-published", metavar="FILE", help="the ckpt.pt to read; nothing in it is executed")
    source.add_argument(
        "--to-published", metavar="FOLDER", help="the exchange folder, URI or models:/NAME@ALIAS to export"
    )
    source.add_argument(
        "--from-huggingface",
        metavar="FOLDER",
        help="the folder that save_pretrained of transformers wrote, for the model and for its tokenizer",
    )
    source.add_argument(
        "--to-tensorrt-llm",
        metavar="FOLDER",
        help="the exchange folder or models:/NAME@ALIAS to convert, with padded heads",
    )
    parser.add_argument("--out", required=True, metavar="PATH", help="the folder, or file, to make")
    parser.add_argument(
        "--tokenizer",
        metavar="gpt2|FOLDER",
        help="with --from-published: GPT-2's, or that of a folder of prepared data or of a converted model (gpt2); "
        "with --from-huggingface: the same, where the folder has none of its own",
    )
    return parser


def _source(option: str, text: str) -> Path:
    """A converted model's folder on this machine; a registered one is looked up, one in a remote storage fetched."""
    if is_reference(text):
        return model_folder(text, absolute_storage(default_storage()))
    return local_artefact(text) if is_remote(text) else _local(option, text)


def _local(option: str, text: str) -> Path:
    """An absolute path on this machine; a relative one would be lost with a submitted job's copy of the code."""
    if is_remote(text):
        raise ConfigError(f"--{option}={text} is a URI; give a path on this machine")
    if not os.path.isabs(text) and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise ConfigError(f"--{option}={text} is relative, and a submitted job runs elsewhere; give an absolute path")
    return Path(text).absolute()


def _import(path: Path, folder: Path, tokenizer: str) -> None:
    from kraken.published import from_published

    manifest = from_published(path, folder, tokenizer)
    origin = manifest.details["published"]
    print(f"convert finished: {folder}")
    print(
        f"  parameters {manifest.value('parameters'):,}, iter_num {origin['iter_num']}, sha256 {origin['sha256'][:16]}"
    )
    print(f"serve it: serve run serve.app:build exchange={folder}")


def _import_saved(source: Path, folder: Path, tokenizer: str | None) -> None:
    from kraken.saved import from_saved

    manifest = from_saved(source, folder, tokenizer)
    print(f"convert finished: {folder}")
    print(f"  parameters {manifest.value('parameters'):,}")
    print(f"serve it: serve run serve.app:build exchange={folder}")


def _export(folder: Path, path: Path) -> None:
    from kraken.published import to_published

    record = to_published(folder, path)
    loss = "not known" if record.best_val_loss is None else record.best_val_loss
    print(f"convert finished: {path}")
    print(f"  iter_num {record.iter_num or 0}, best_val_loss {loss}")
    print("  the optimizer starts afresh: an exchange folder keeps no moments")


def _to_trtllm(exchange: Path, folder: Path) -> None:
    from kraken.trtllm.checkpoint import from_exchange

    if not exchange.is_dir():
        raise ConfigError(f"--to-tensorrt-llm={exchange} is no folder; give the exchange folder of a converted model")
    manifest = from_exchange(exchange, folder)
    sizes = (manifest.details["head_size"], manifest.details["padded_head_size"])
    print(f"convert finished: {folder}")
    print("  heads of {} channels became {}".format(*sizes))
    print(f"  padding changes the logits by {manifest.value('padding_max_abs_diff'):.1e}, in float32")


if __name__ == "__main__":
    run_job(main)
