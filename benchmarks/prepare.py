"""Text to tokens: ours through Ray beside the widespread recipe, same corpus, same cores, same tokens.

    python -m benchmarks.prepare --megabytes 200

The recipe is `datasets.map(num_proc=cores)` over a function that calls tiktoken's `encode_ordinary` on one document and
appends end-of-text, then a memory-mapped uint16 file filled in 1,024 batches. Ours is `kraken.data.prepare` with Ray
tasks. Both read the same Parquet files (the recipe through `load_dataset`, whose conversion to its Arrow cache is not
timed) and end with the tokens of all documents in one order on disk. The ranks are GPT-2-like: 50,256 byte pairs with
GPT-2's pattern, learnt from the embedded corpus, which is also the text, repeated.

Not timed, for either: making the corpus and the ranks, loading the ranks in the process that is timed, starting Ray and
its workers (each has tokenised a small piece before), importing `datasets`. Timed for the recipe: starting its
processes, which `map` does anew each time; `map_recipe_start_s` says how long that takes on two documents. Timed for
ours: planning, scheduling, tokenising, flushing the shards to disk, the entropy of the held-out tokens.

Each round runs the recipe, ours, and ours on one worker, one after the other. The last line is JSON:
`ratio_vs_map_recipe` is our tokens/s over the recipe's, `two_worker_scaling` ours with two workers over ours with one,
medians over the rounds.
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NUM_IDS = 50_256
MEMMAP_BATCHES = 1024
CORES = 2
"""Processes of the recipe and workers of ours; what `two_worker_scaling` means."""
HELD_OUT = 0.002
"""Nearly nothing: the recipe writes one split. What is held out is compared too."""


def make_ranks(folder: Path) -> None:
    """GPT-2-like ranks from the embedded corpus, kept in `folder` from one run of the benchmark to the next."""
    from kraken.data.embedded import EmbeddedCorpus
    from kraken.tokenizer import META_NAME, Tokenizer

    if not (folder / META_NAME).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        Tokenizer.train((document.text for document in EmbeddedCorpus().documents), NUM_IDS).save(folder)


def write_corpus(folder: Path, megabytes: float) -> int:
    """The embedded corpus, repeated to a size, as Parquet files in row groups; returns the number of files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from kraken.data.embedded import EmbeddedCorpus

    texts = [document.text for document in EmbeddedCorpus().documents]
    one_copy = sum(len(text.encode()) for text in texts) / 1e6
    copies = max(1, round(megabytes / one_copy))
    folder.mkdir(parents=True)
    for index in range(copies):
        pq.write_table(pa.table({"text": texts}), folder / f"{index:06d}.parquet", row_group_size=100)
    return copies


class MapRecipe:
    """The widespread recipe."""

    def __init__(self, corpus: Path, ranks: Path, folder: Path, cores: int):
        import datasets

        from kraken.tokenizer import Tokenizer

        datasets.disable_progress_bars()
        self.dataset = datasets.load_dataset("parquet", data_files=f"{corpus}/*.parquet", split="train")
        self.tokenizer = Tokenizer.load(ranks)
        self.folder, self.cores = folder, cores

    def map(self, dataset: Any) -> Any:
        """Ids and their number of each document."""
        encoding, eot_id = self.tokenizer._encoding, self.tokenizer.eot_id

        def process(example: dict[str, str]) -> dict[str, Any]:
            ids = encoding.encode_ordinary(example["text"])
            ids.append(eot_id)
            return {"ids": ids, "len": len(ids)}

        return dataset.map(
            process, remove_columns=["text"], num_proc=self.cores, load_from_cache_file=False, desc="tokenising"
        )

    def start_seconds(self) -> float:
        """Time of `map` where there is nothing to do."""
        started_at = time.perf_counter()
        self.map(self.dataset.select(range(self.cores)))
        return time.perf_counter() - started_at

    def run(self) -> tuple[float, Path]:
        """Seconds, and the file of tokens."""
        import numpy as np

        path = self.folder / "recipe.bin"
        started_at = time.perf_counter()
        tokenized = self.map(self.dataset)
        num_tokens = int(np.sum(tokenized["len"], dtype=np.uint64))
        target = np.memmap(path, dtype=np.uint16, mode="w+", shape=(num_tokens,))
        filled = 0
        num_batches = min(MEMMAP_BATCHES, len(tokenized))
        for index in range(num_batches):
            batch = tokenized.shard(num_shards=num_batches, index=index, contiguous=True).with_format("numpy")
            ids = np.concatenate(batch["ids"])
            target[filled : filled + len(ids)] = ids
            filled += len(ids)
        target.flush()
        seconds = time.perf_counter() - started_at
        tokenized.cleanup_cache_files()
        return seconds, path


class Ours:
    """`kraken.data.prepare` on Ray; the ranks are already in the artefact's folder, as after an interruption."""

    def __init__(self, corpus: Path, ranks: Path, folder: Path):
        self.corpus, self.ranks, self.folder = corpus, ranks, folder

    def run(self, workers: int) -> tuple[float, Path]:
        """Seconds, and the folder of shards."""
        from kraken.config import DataConfig
        from kraken.data.corpora import open_corpus
        from kraken.data.prepare import prepare
        from kraken.storage import Storage
        from pipelines.prepare_tasks import PieceTasks
        from pipelines.stage import Work

        data = DataConfig(
            corpus="files", paths=(str(self.corpus),), num_trained_ids=NUM_IDS, validation_fraction=HELD_OUT
        )
        storage = Storage(str(self.folder))
        folder = storage.folder("prepare", "benchmark")
        shutil.rmtree(folder)
        shutil.copytree(self.ranks, folder)
        config: Any = SimpleNamespace(data=data)
        run: Any = None  # nothing is tracked
        work = Work(config, "benchmark", storage, folder, {}, run)
        started_at = time.perf_counter()
        prepare(data, open_corpus(data), folder, lambda done, total, note: None, PieceTasks(work, workers))
        return time.perf_counter() - started_at, folder


def require_same_tokens(recipe: Path, ours: Path, corpus: Path) -> int:
    """Compare both, document by document; returns the number of tokens.

    The recipe keeps all documents in order; ours keeps the held-out ones in files of their own, in order too.
    """
    import numpy as np

    from kraken.config import DataConfig
    from kraken.data.corpora import open_corpus
    from kraken.data.corpus import Split, split_of
    from kraken.data.shards import TokenShards
    from kraken.tokenizer import Tokenizer

    eot_id, num_ids = Tokenizer.load(ours).eot_id, NUM_IDS + 1
    theirs = np.fromfile(recipe, dtype=np.uint16)
    ends = np.flatnonzero(theirs == eot_id) + 1
    source = open_corpus(DataConfig(corpus="files", paths=(str(corpus),)))
    texts = (doc.text for piece in source.pieces(2**30) for doc in source.read(piece, lambda message: None))
    is_held_out = np.array([split_of(text.encode(), HELD_OUT) == "validation" for text in texts])
    lengths = np.diff(ends, prepend=0)
    assert len(lengths) == len(is_held_out), "the two have different numbers of documents"
    held_out = np.repeat(is_held_out, lengths)
    splits: tuple[tuple[Split, np.ndarray], ...] = (("train", theirs[~held_out]), ("validation", theirs[held_out]))
    for split, expected in splits:
        shards = TokenShards(ours, split, num_ids)
        assert np.array_equal(shards.read(0, shards.num_tokens), expected), f"the {split} tokens differ"
    return len(theirs)


def timed(name: str, num_tokens: int | None, run: Callable[[], tuple[float, Path]]) -> tuple[float, Path]:
    """Run once and say how fast it was."""
    seconds, path = run()
    speed = f", {num_tokens / seconds:,.0f} tokens/s" if num_tokens else ""
    print(f"{name}: {seconds:.1f} s{speed}", flush=True)
    return seconds, path


def benchmark(megabytes: float, rounds: int, folder: Path) -> dict[str, float]:
    """All rounds, on a Ray that runs already."""
    ranks = Path(tempfile.gettempdir()) / f"kraken-benchmark-ranks-{NUM_IDS}"
    make_ranks(ranks)
    corpus = folder / "corpus"
    print(f"{write_corpus(corpus, megabytes)} copies of the embedded corpus, {CORES} cores", flush=True)
    (folder / "warm-up").mkdir()
    for index in range(2 * CORES):
        shutil.copy(corpus / "000000.parquet", folder / "warm-up" / f"{index}.parquet")
    recipe = MapRecipe(corpus, ranks, folder, CORES)
    start_s = recipe.start_seconds()
    ours = Ours(corpus, ranks, folder / "ours")
    Ours(folder / "warm-up", ranks, folder / "warmed").run(CORES)
    theirs_s, ours_s, one_s = [], [], []
    num_tokens: int | None = None
    for _ in range(rounds):
        seconds, tokens = timed("recipe", num_tokens, recipe.run)
        theirs_s.append(seconds)
        seconds, shards = timed(f"ours, {CORES} workers", num_tokens, lambda: ours.run(CORES))
        ours_s.append(seconds)
        num_tokens = num_tokens or require_same_tokens(tokens, shards, corpus)
        one_s.append(timed("ours, 1 worker", num_tokens, lambda: ours.run(1))[0])
    assert num_tokens is not None
    speed = {name: num_tokens / statistics.median(s) for name, s in (("map", theirs_s), ("ours", ours_s))}
    return {
        "ratio_vs_map_recipe": round(speed["ours"] / speed["map"], 3),
        "two_worker_scaling": round(statistics.median(one_s) / statistics.median(ours_s), 3),
        "tokens_per_second": round(speed["ours"]),
        "map_recipe_tokens_per_second": round(speed["map"]),
        "map_recipe_start_s": round(start_s, 3),
        "tokens": num_tokens,
        "cores": CORES,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=200, help="size of the corpus (200)")
    parser.add_argument("--rounds", type=int, default=3, help="alternations (3)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kraken-benchmark-"))
    try:
        os.environ.update({"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
        from kraken.presets import quickstart
        from pipelines import cluster

        with cluster.connect(dataclasses.replace(quickstart(), storage=str(folder / "storage"))):
            result = benchmark(args.megabytes, args.rounds, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
