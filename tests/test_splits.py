"""Splits that are empty or too short: said before a worker trains, with a way out that works when it is taken."""

import dataclasses
import json
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny

from kraken.config import ConfigError, DataConfig
from kraken.data.corpora import open_corpus
from kraken.data.corpus import split_of
from kraken.data.loader import Loader
from kraken.data.prepare import adopt_nanogpt, prepare
from kraken.data.shards import TokenShards
from kraken.data.splits import require_windows, suggest_fraction
from kraken.manifest import ArtefactError, Manifest, Metric
from kraken.tokenizer import Tokenizer
from kraken.training.train import train

CONTEXT_LENGTH = 32


def words(seed: int, count: int) -> str:
    return " ".join(random.Random(seed).choices(tiny.WORDS, k=count))


def write(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def data_config(path: Path, **changes: Any) -> DataConfig:
    return DataConfig(corpus="files", paths=(str(path),), **({"num_trained_ids": 300} | changes))


def prepared(config: DataConfig, folder: Path) -> Manifest:
    """Prepare into an empty folder; returns what the manifest says."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    metrics, details = prepare(config, open_corpus(config), folder, lambda done, total, note: None)
    return Manifest(kind="prepare", fingerprint="x", config={}, parents={}, metrics=metrics, details=details)


def suggested(message: str) -> float:
    found = re.search(r"set data.validation_fraction=(0\.\d+)", message)
    assert found, message
    return float(found[1])


class TestDuplicates:
    def test_equal_texts_lie_in_one_split(self, tmp_path: Path) -> None:
        """Under other names, in other formats, and where a file is long enough to be cut."""
        texts = [words(seed, 60) for seed in range(60)]
        for name in ("a", "b"):
            write(tmp_path / f"{name}.jsonl", texts if name == "a" else texts[::-1])
            (tmp_path / f"{name}.txt").write_text("\n".join(words(seed, 400) for seed in range(200)))
        (tmp_path / "c.txt").write_text(texts[0])
        config = data_config(tmp_path)
        documents = [
            d for piece in open_corpus(config).pieces(2**20) for d in open_corpus(config).read(piece, pytest.fail)
        ]
        manifest = prepared(config, tmp_path / "out")
        tokenizer = Tokenizer.load(tmp_path / "out")
        held_out = TokenShards(tmp_path / "out", "validation", tokenizer.num_ids)
        text = tokenizer.decode(held_out.read(0, held_out.num_tokens))
        in_validation = [d for d in documents if d.text in text]
        assert 0 < len(in_validation) == manifest.value("validation_documents")
        assert len({d.text for d in documents}) * 2 == len(documents) - 1
        assert {d.text for d in in_validation}.isdisjoint(d.text for d in documents if d not in in_validation)


class TestEmptySplits:
    @pytest.mark.parametrize("num_documents", [2, 3, 10])
    @pytest.mark.parametrize("fraction", [0.001, 0.49])
    def test_of_a_few_documents_the_error_names_a_fraction_that_works(
        self, tmp_path: Path, num_documents: int, fraction: float
    ) -> None:
        """Seeds for which there is one; the next test has the others."""
        num_errors = 0
        for seed in range(5):
            texts = [words(100 * seed + index, 60) for index in range(num_documents)]
            path = write(tmp_path / "x.jsonl", texts)
            if len({split_of(text.encode(), 0.45) for text in texts}) == 1:
                continue
            try:
                prepared(data_config(path, validation_fraction=fraction), tmp_path / "out")
            except ArtefactError as error:
                num_errors += 1
                works = suggested(str(error))
                assert prepared(data_config(path, validation_fraction=works), tmp_path / "out").value("train_tokens")
        assert num_errors or fraction > 0.4

    def test_where_no_fraction_helps_none_is_named(self, tmp_path: Path) -> None:
        late = next(
            text for text in (words(seed, 60) for seed in range(99)) if split_of(text.encode(), 0.499) == "train"
        )
        later = next(
            text for text in (words(seed, 60) for seed in range(100, 199)) if split_of(text.encode(), 0.499) == "train"
        )
        for texts, message in (
            ([late], "is a single document, and a document lies in one split as a whole: give several"),
            ([late] * 3, "the 3 documents of the corpus have the same text.*: give different ones"),
            ([late, later], "no data.validation_fraction divides these 2 documents well enough: give more text"),
        ):
            with pytest.raises(ArtefactError, match=f"validation split holds no tokens .*; .*{message}") as refused:
                prepared(data_config(write(tmp_path / "x.jsonl", texts)), tmp_path / "out")
            assert "set data.validation_fraction" not in str(refused.value)
        path = write(tmp_path / "x.jsonl", [late, later, "\ud800"])
        with pytest.raises(ArtefactError, match=r"no tokens .* \(1 documents were left out\)"):
            prepared(data_config(path, on_bad_document="skip"), tmp_path / "out")

    def test_a_lone_text_of_200_kb_has_both_splits(self, tmp_path: Path) -> None:
        (tmp_path / "one.txt").write_text("\n".join(words(seed, 12) for seed in range(2500)))
        manifest = prepared(data_config(tmp_path / "one.txt"), tmp_path / "out")
        assert manifest.value("validation_tokens") > 0.01 * manifest.value("train_tokens")
        require_windows(tmp_path / "out", manifest, 256)


class TestShortSplits:
    def short(self, path: Path) -> DataConfig:
        """120 documents; each document of the validation split is one letter."""
        texts = [words(seed, 60) for seed in range(300)]
        texts = [text for text in texts if split_of(text.encode(), 0.05) == "train"]
        letters = [letter for letter in "abcdefghijklmnopqrstuvwxyz" if split_of(letter.encode(), 0.05) == "validation"]
        return data_config(write(path, texts[:120] + letters[:1]), validation_fraction=0.05)

    def test_a_validation_split_shorter_than_a_window_is_an_error_with_a_way_out(self, tmp_path: Path) -> None:
        config = self.short(tmp_path / "x.jsonl")
        manifest = prepared(config, tmp_path / "out")
        assert 0 < manifest.value("validation_tokens") <= CONTEXT_LENGTH
        with pytest.raises(ArtefactError, match="validation split of 2 tokens is shorter than one window") as refused:
            require_windows(tmp_path / "out", manifest, CONTEXT_LENGTH)
        better = dataclasses.replace(config, validation_fraction=suggested(str(refused.value)))
        require_windows(tmp_path / "out", prepared(better, tmp_path / "out"), CONTEXT_LENGTH)
        with pytest.raises(ArtefactError, match="no data.validation_fraction divides.*shorter model.context_length"):
            require_windows(tmp_path / "out", manifest, 10**6)

    def test_a_training_split_shorter_than_the_loader_needs_is_an_error(self, tmp_path: Path) -> None:
        manifest = prepared(self.short(tmp_path / "x.jsonl"), tmp_path / "out")
        shards = TokenShards(tmp_path / "out", "train", 301)
        longest = (shards.num_tokens - 1) // 2
        Loader(shards, longest, 1, seed=0)
        enough = dataclasses.replace(
            manifest, metrics=manifest.metrics | {"validation_tokens": Metric(10**6, "tokens")}
        )
        require_windows(tmp_path / "out", enough, longest)
        with pytest.raises(ArtefactError, match="train split .* shorter than two windows"):
            require_windows(tmp_path / "out", enough, longest + 1)
        with pytest.raises(ArtefactError, match="shorter than two windows"):
            Loader(shards, longest + 1, 1, seed=0)

    def test_training_checks_it_before_its_first_step(self, tmp_path: Path) -> None:
        from kraken.manifest import finish_artefact

        run = tiny.config()
        data = prepared(self.short(tmp_path / "x.jsonl"), tmp_path / "out")
        finish_artefact(
            tmp_path / "out", started_at=0.0, kind="prepare", fingerprint="x", config={}, parents={},
            metrics=data.metrics, details=data.details,
        )  # fmt: skip
        hooks = SimpleNamespace(on_step=pytest.fail, on_checkpoint=pytest.fail, stop_requested=lambda: False)
        with pytest.raises(ArtefactError, match="validation split of 2 tokens"):
            train(run, tmp_path / "out", tmp_path / "run", hooks)
        assert not (tmp_path / "run").exists()

    def test_the_stage_checks_it_before_any_worker_starts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from kraken.storage import Storage
        from pipelines import pretrain
        from pipelines.stage import Work
        from pipelines.training import workers

        monkeypatch.setattr(workers, "fit", pytest.fail)
        storage = Storage(str(tmp_path / "storage"))
        data = prepared(self.short(tmp_path / "x.jsonl"), storage.folder("prepare", "x"))
        run: Any = None
        work = Work(tiny.config(), "f", storage, storage.folder("pretrain", "f"), {"prepare": data}, run)
        with pytest.raises(ArtefactError, match="validation split of 2 tokens .* set data.validation_fraction=0"):
            pretrain.work(work)

    def test_token_files_of_others_are_asked_to_be_longer(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tokenizer = Tokenizer({bytes([byte]): byte for byte in range(256)}, "x", "bytes")
        monkeypatch.setattr(Tokenizer, "gpt2", classmethod(lambda cls: tokenizer))
        folder = tmp_path / "gpt [2]"  # a name that is a pattern, too
        folder.mkdir()
        for name, num_tokens in (("train.bin", 1000), ("val.bin", 20)):
            np.zeros(num_tokens, dtype=np.uint16).tofile(folder / name)
        config = DataConfig(corpus="nanogpt", paths=(str(folder),), tokenizer="gpt2")
        (tmp_path / "out").mkdir()
        metrics, details = adopt_nanogpt(config, tmp_path / "out")
        manifest = Manifest(kind="prepare", fingerprint="x", config={}, parents={}, metrics=metrics, details=details)
        with pytest.raises(ArtefactError, match="20 tokens is shorter than one window .*; give longer token files"):
            require_windows(tmp_path / "out", manifest, CONTEXT_LENGTH)


def test_a_suggested_fraction_gives_both_splits_what_they_need() -> None:
    rng = random.Random(0)
    num_found = 0
    for _ in range(500):
        documents = sorted((rng.random(), rng.randint(1, 50)) for _ in range(rng.randint(2, 12)))
        total = sum(size for _, size in documents)
        num_validation, num_train = rng.randint(1, 60), rng.randint(1, 60)
        fraction = suggest_fraction(documents, len(documents), total, num_validation, num_train)
        if fraction is None:
            continue
        num_found += 1
        held_out = sum(size for position, size in documents if position < fraction)
        assert held_out >= num_validation and total - held_out >= num_train
        DataConfig(validation_fraction=fraction)  # in its range
    assert num_found > 100
    with pytest.raises(ConfigError):
        DataConfig(validation_fraction=0.5)
