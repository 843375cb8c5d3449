"""Pieces to shards: the same bytes whoever does the work, nothing done twice, memory that does not grow."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from kraken.config import ConfigError, DataConfig, RunConfig
from kraken.data.corpora import open_corpus
from kraken.data.corpus import Document, Piece, split_of
from kraken.data.files import SECTION_BYTES
from kraken.data.pieces import RECORDS_FOLDER, finished_record, tokenize_piece, training_texts
from kraken.data.prepare import prepare
from kraken.data.shards import TokenShards, shard_name
from kraken.manifest import MANIFEST_NAME, ArtefactError, Manifest, Metric
from kraken.storage import Storage
from kraken.tokenizer import Tokenizer
from pipelines.prepare import is_valid
from pipelines.progress import ProgressLines

Files = dict[str, bytes]


def quiet(done: int, total: int, note: str) -> None:
    """No progress shown."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with JSONL and with a text file that is cut into sections."""
    folder = tmp_path_factory.mktemp("source")
    texts = [document.text for document in tiny.corpus(tmp_path_factory.mktemp("corpus")).documents]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "b.txt").write_text("\n".join(texts * 12))
    return folder


def data_config(source: Path, **changes: Any) -> DataConfig:
    settings = {"num_trained_ids": 300, "validation_fraction": 0.2, "bytes_per_piece": 3 * SECTION_BYTES}
    return DataConfig(corpus="files", paths=(str(source),), **(settings | changes))


def prepare_here(config: DataConfig, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    return prepare(config, open_corpus(config), folder, quiet)


def contents(folder: Path) -> Files:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("undisturbed")
    prepare_here(data_config(source), folder)
    return contents(folder)


class TestTokens:
    def test_they_are_those_of_the_documents_one_after_the_other(self, source: Path, tmp_path: Path) -> None:
        config = data_config(source)
        metrics, _ = prepare_here(config, tmp_path)
        tokenizer = Tokenizer.load(tmp_path)
        corpus = open_corpus(config)
        pieces = corpus.pieces(2**30)
        documents = [document for piece in pieces for document in corpus.read(piece, pytest.fail)]
        for split in ("train", "validation"):
            mine = [d for d in documents if split_of(d.text.encode(), 0.2) == split]
            expected = [i for d in mine for i in (*tokenizer.encode(d.text), *[tokenizer.eot_id] * d.ends)]
            shards = TokenShards(tmp_path, split, tokenizer.num_ids)
            assert shards.read(0, shards.num_tokens).tolist() == expected
            assert metrics[f"{split}_tokens"].value == len(expected)
            assert metrics[f"{split}_documents"].value == len(mine)
            assert metrics[f"{split}_bytes"].value == sum(len(d.text.encode()) for d in mine)

    @pytest.mark.parametrize("bytes_per_piece", [1, 10 * SECTION_BYTES, 2**30])
    def test_the_size_of_pieces_does_not_change_them(
        self, source: Path, tmp_path: Path, undisturbed: Files, bytes_per_piece: int
    ) -> None:
        prepare_here(data_config(source, bytes_per_piece=bytes_per_piece), tmp_path)
        for split in ("train", "validation"):
            mine, theirs = (
                b"".join(files[name] for name in sorted(files) if name.startswith(split))
                for files in (contents(tmp_path), undisturbed)
            )
            assert mine == theirs

    def test_the_tokenizer_learns_from_a_bounded_part_of_the_training_split(self, source: Path) -> None:
        config = data_config(source, tokenizer_training_bytes=20_000)
        corpus = open_corpus(config)
        pieces = corpus.pieces(config.bytes_per_piece)
        sample = list(training_texts(config, corpus, pieces))
        assert 15_000 < sum(len(text.encode()) for text in sample) <= 20_000
        assert sample == list(training_texts(config, open_corpus(config), pieces))
        unbounded = data_config(source)
        everything = list(training_texts(unbounded, corpus, pieces))
        documents = (document for piece in pieces for document in corpus.read(piece, pytest.fail))
        assert everything == [d.text for d in documents if split_of(d.text.encode(), 0.2) == "train"]


class TestBadInput:
    def test_one_document_stops_the_work_or_is_counted(self, tmp_path: Path) -> None:
        rows = [json.dumps({"text": f"text {i} " + "word " * 50}) for i in range(100)]
        rows[40:40] = ["{", json.dumps({"text": "half \ud800"})]
        path = tmp_path / "x.jsonl"
        path.write_text("\n".join(rows))
        with pytest.raises(ArtefactError, match=r"x.jsonl, byte \d+: not a JSON.*data.on_bad_document=skip"):
            prepare_here(data_config(path), tmp_path / "stop")
        metrics, details = prepare_here(data_config(path, on_bad_document="skip"), tmp_path / "skip")
        assert metrics["skipped_documents"].value == 2
        assert metrics["train_documents"].value + metrics["validation_documents"].value == 100
        assert "not a JSON object" in details["skipped"][0] and "surrogate" in details["skipped"][1]

    def test_a_document_of_blanks_is_a_document_like_others(self, tmp_path: Path) -> None:
        texts = [f"text {i} " + "word " * 50 for i in range(100)]
        texts[20] = "a" + " " * 1_500_000 + "b"
        (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        metrics, _ = prepare_here(data_config(tmp_path / "x.jsonl"), tmp_path / "out")
        assert metrics["train_documents"].value + metrics["validation_documents"].value == 100
        assert metrics["train_bytes"].value + metrics["validation_bytes"].value == sum(map(len, texts))

    def test_a_document_that_cannot_be_encoded_is_named(self, tmp_path: Path) -> None:
        texts = ["text one", " " * 1_500_000 + "b", "text two"]
        (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        ranks = {bytes([byte]): byte for byte in range(256)}
        tokenizer = Tokenizer(ranks, r"\s+(?!\S)|\s|\S+", "other")  # a pattern for which runs of blanks are not cut
        config = data_config(tmp_path / "x.jsonl")
        corpus = open_corpus(config)
        [piece] = corpus.pieces(2**30)
        with pytest.raises(ArtefactError, match=r"x.jsonl:21: tiktoken cannot encode .*data.on_bad_document=skip"):
            tokenize_piece(config, corpus, piece, tokenizer, tmp_path)
        config = data_config(tmp_path / "x.jsonl", on_bad_document="skip")
        record = tokenize_piece(config, corpus, piece, tokenizer, tmp_path)
        assert record.num_skipped == 1 and record.num_tokens == 18
        assert record.skipped[0].startswith("x.jsonl:21: tiktoken cannot encode these 1500001 characters")
        assert finished_record(tmp_path, piece, tokenizer) == record

    def test_both_settings_share_what_has_no_bad_document(self, tmp_path: Path) -> None:
        """The folder is the same: `skip` continues what `stop` left, and `stop` accepts nothing skipped."""
        folder = tmp_path / "corpus"
        folder.mkdir()
        for name, bad in (("a.jsonl", []), ("b.jsonl", ["{"]), ("c.jsonl", [])):
            rows = [json.dumps({"text": f"text {i} " + "word " * 50}) for i in range(100)]
            (folder / name).write_text("\n".join([*bad, *rows]))
        stop, skip = (data_config(folder, on_bad_document=choice) for choice in ("stop", "skip"))
        made = tmp_path / "made"
        made.mkdir()
        Tokenizer.train(("text and word " * 50 for _ in range(9)), 257).save(made)  # so that the pieces come first
        with pytest.raises(ArtefactError, match="b.jsonl"):
            prepare_here(stop, made)
        finished = made / shard_name("train", 0)
        written_at = finished.stat().st_mtime_ns
        metrics, _ = prepare_here(skip, made)
        assert metrics["skipped_documents"].value == 1
        assert finished.stat().st_mtime_ns == written_at, "the piece before the bad document is not done again"
        with pytest.raises(ArtefactError, match="b.jsonl"):
            prepare_here(stop, made)

    def test_data_without_their_bad_documents_are_not_reused_for_stop(self) -> None:
        manifest = Manifest(
            kind="prepare",
            fingerprint="f" * 64,
            config={},
            parents={},
            metrics={"skipped_documents": Metric(2, "documents")},
        )
        config = tiny.config()
        with pytest.raises(
            ConfigError, match="data.on_bad_document=stop, but the prepared data ffffffffffff leave out 2"
        ):
            is_valid(config, manifest)
        assert is_valid(config, dataclasses.replace(manifest, metrics={"skipped_documents": Metric(0, "documents")}))

    def test_empty_corpora_and_splits_are_errors(self, tmp_path: Path) -> None:
        (tmp_path / "x.txt").write_text("")
        with pytest.raises(ArtefactError, match="the corpus is empty"):
            prepare_here(data_config(tmp_path / "x.txt"), tmp_path / "a")
        (tmp_path / "x.txt").write_text("all of one document " * 100)
        with pytest.raises(ArtefactError, match="the validation split holds no tokens"):
            prepare_here(data_config(tmp_path / "x.txt", num_trained_ids=257), tmp_path / "b")


class Interrupted:
    """A corpus that fails at one of its documents, as often as it is read there."""

    def __init__(self, config: DataConfig, piece: int, document: int):
        self.corpus = open_corpus(config)
        self.name, self.unit, self.fingerprint = self.corpus.name, self.corpus.unit, self.corpus.fingerprint
        self.piece, self.document = piece, document

    def pieces(self, bytes_per_piece: int) -> tuple[Piece, ...]:
        return self.corpus.pieces(bytes_per_piece)

    def read(self, piece: Piece, on_bad: Any) -> Iterator[Document]:
        for index, document in enumerate(self.corpus.read(piece, on_bad)):
            if (piece.index, index) == (self.piece, self.document):
                raise KeyboardInterrupt
            yield document


class TestResuming:
    def test_finished_pieces_are_not_done_again(self, source: Path, tmp_path: Path, undisturbed: Files) -> None:
        config = data_config(source)
        Tokenizer.train(training_texts(config, open_corpus(config), open_corpus(config).pieces(2**20)), 300).save(
            tmp_path
        )
        with pytest.raises(KeyboardInterrupt):
            prepare(config, Interrupted(config, 4, 2), tmp_path, quiet)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        assert len(list((tmp_path / RECORDS_FOLDER).iterdir())) == 4
        (tmp_path / ".train_000004.bin.killed").write_bytes(b"left by a killed process")
        (tmp_path / "train_000999.bin").write_bytes(b"left by another version")
        done: list[int] = []

        def workers(pieces: Any, tokenizer: Tokenizer) -> Iterator[Any]:
            for piece in pieces:
                done.append(piece.index)
                yield tokenize_piece(config, open_corpus(config), piece, tokenizer, tmp_path)

        prepare(config, open_corpus(config), tmp_path, quiet, workers)
        assert done == list(range(4, len(open_corpus(config).pieces(config.bytes_per_piece))))
        assert all(path.stat().st_mtime_ns == time for path, time in before.items())
        assert contents(tmp_path) == undisturbed

    def test_a_killed_process_leaves_only_whole_pieces(self, source: Path, tmp_path: Path, undisturbed: Files) -> None:
        code = """
import sys, time
from pathlib import Path
from kraken.config import DataConfig
from kraken.data.corpora import open_corpus
from kraken.data.prepare import prepare
config = DataConfig(corpus="files", paths=(sys.argv[1],), num_trained_ids=300, validation_fraction=0.2,
                    bytes_per_piece=int(sys.argv[3]))
slowly = lambda done, total, note: print(done, flush=True) or time.sleep(0.2)
prepare(config, open_corpus(config), Path(sys.argv[2]), slowly)
"""
        config = data_config(source)
        command = [sys.executable, "-c", code, str(source), str(tmp_path), str(config.bytes_per_piece)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(3):
                assert process.stdout.readline()
            process.kill()
        finished = list((tmp_path / RECORDS_FOLDER).iterdir())
        times = {path: path.stat().st_mtime_ns for path in finished}
        assert 3 <= len(finished) < len(open_corpus(config).pieces(config.bytes_per_piece))
        prepare_here(config, tmp_path)
        assert {path: path.stat().st_mtime_ns for path in finished} == times
        assert contents(tmp_path) == undisturbed

    def test_a_damaged_shard_or_record_is_done_again(self, source: Path, tmp_path: Path, undisturbed: Files) -> None:
        config = data_config(source)
        prepare_here(config, tmp_path)
        (tmp_path / "train_000001.bin").write_bytes(b"\0\0")
        (tmp_path / RECORDS_FOLDER / "000002.json").write_text("{")
        prepare_here(config, tmp_path)
        assert contents(tmp_path) == undisturbed


def run_stage(config: RunConfig, max_workers: int | None = None) -> Path:
    """What the stage does, on the cluster of the tests; returns the artefact's folder."""
    from pipelines import prepare as stage
    from pipelines import prepare_tasks
    from pipelines.stage import Work

    storage = Storage(config.storage)
    folder = storage.folder("prepare", "f" * 64)
    work = Work(config, "f" * 64, storage, folder, {}, SimpleNamespace())  # type: ignore[arg-type]  # not tracked
    if max_workers is None:
        stage.work(work)
    else:
        tasks = prepare_tasks.PieceTasks(work, max_workers)
        prepare(config.data, open_corpus(config.data), folder, quiet, tasks)
    storage.publish(folder)
    return folder


def run_config(data: DataConfig, storage: Path | str) -> RunConfig:
    run = dataclasses.replace(tiny.config(), storage=str(storage))
    return dataclasses.replace(run, data=data)


@pytest.mark.ray
class TestOnRay:
    @pytest.mark.parametrize(
        "max_workers", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(None, marks=pytest.mark.slow)]
    )
    def test_the_number_of_workers_changes_nothing(
        self, ray_cluster: str, source: Path, tmp_path: Path, undisturbed: Files, max_workers: int | None
    ) -> None:
        folder = run_stage(run_config(data_config(source), tmp_path), max_workers)
        assert contents(folder) == undisturbed

    def test_a_failing_piece_says_why_and_the_others_stay(
        self, ray_cluster: str, source: Path, tmp_path: Path, undisturbed: Files
    ) -> None:
        mine = tmp_path / "source"
        mine.mkdir()
        for path in source.iterdir():
            (mine / path.name).write_bytes(path.read_bytes())
        (mine / "c.txt").write_bytes(b"\xff" * SECTION_BYTES)
        config = run_config(data_config(mine, tokenizer_training_bytes=1000), tmp_path / "storage")
        with pytest.raises(ArtefactError, match="c.txt, byte 0: not UTF-8"):
            run_stage(config, 1)

    def test_a_remote_storage_holds_what_is_finished(
        self, ray_cluster: str, source: Path, tmp_path: Path, undisturbed: Files
    ) -> None:
        """Each Ray worker has the machine's cache; the stage here has one of its own, as on another node."""
        from pipelines import prepare as stage
        from pipelines.stage import Work

        remote = tmp_path / "remote"
        config = run_config(data_config(source), remote.as_uri())
        for attempt in ("first", "second"):
            storage = Storage(config.storage, cache=tmp_path / attempt)
            folder = storage.folder("prepare", "f" * 64)
            work = Work(config, "f" * 64, storage, folder, {}, SimpleNamespace())  # type: ignore[arg-type]
            if attempt == "second":  # what the first left in the storage is lost in part
                published = remote / "prepare" / ("f" * 16)
                (published / "train_000001.bin").unlink()
                (published / "train_000777.bin").write_bytes(b"left by another version")
                kept = {p: p.stat().st_mtime_ns for p in published.rglob("*") if p.name != "train_000777.bin"}
            stage.work(work)
            storage.publish(folder)
            assert contents(folder) == undisturbed
            assert contents(remote / "prepare" / ("f" * 16)) == undisturbed
        rewritten = [p.name for p, time in kept.items() if p.is_file() and p.stat().st_mtime_ns != time]
        shutil.rmtree(Storage(config.storage).root)  # of the Ray workers
        assert set(rewritten) <= {"ranks.tiktoken", "tokenizer_meta.json", "000001.json", "validation_000001.bin"}


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """The largest resident size of a process that prepares 2 MB of JSONL and 8 MB of text, and four times as much."""
    code = """
import sys
from pathlib import Path
from kraken.config import DataConfig
from kraken.data.corpora import open_corpus
from kraken.data.prepare import prepare
config = DataConfig(corpus="files", paths=(sys.argv[1],), num_trained_ids=258, tokenizer_training_bytes=2**18)
folder = Path(sys.argv[2]); folder.mkdir()
prepare(config, open_corpus(config), folder, lambda done, total, note: None)
# not getrusage's, which counts the process that this one was forked from
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    peaks_kib = []
    for times in (1, 4):
        folder = tmp_path / str(times)
        folder.mkdir()
        lines = (json.dumps({"text": f"{index} " + "word " * 1000}) + "\n" for index in range(400 * times))
        (folder / "a.jsonl").write_text("".join(lines))
        (folder / "b.txt").write_text("the quick brown fox jumps\n" * 300_000 * times)
        command = [sys.executable, "-c", code, str(folder), str(tmp_path / f"out{times}")]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks_kib.append(int(result.stdout))
    assert peaks_kib[1] < peaks_kib[0] + 16 * 2**10 and peaks_kib[1] < 2**20


def test_the_fingerprint_follows_the_rules_of_preparation(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that were made by other rules are not reused."""
    import kraken.data.prepare
    from pipelines.prepare import STAGE
    from pipelines.stage import fingerprints

    config = run_config(data_config(source), "/storage")
    before = fingerprints((STAGE,), config)
    assert fingerprints((STAGE,), config) == before
    monkeypatch.setattr(kraken.data.prepare, "RULES", kraken.data.prepare.RULES + 1)
    assert fingerprints((STAGE,), config) != before


def test_progress_lines_carry_the_note(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressLines("prepare: tokenize", "B")(2**20, 2**20, "5,000 tokens/s")
    line = capsys.readouterr().out
    assert "100%" in line and "1.05MB" in line.replace("1.05M/1.05M", "1.05MB") and "5,000 tokens/s" in line
