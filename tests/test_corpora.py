"""Corpora of files, Hugging Face data sets and nanoGPT's tokens: every document once, wherever the cuts fall."""

import dataclasses
import gzip
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from kraken.config import ConfigError, DataConfig
from kraken.data.corpus import Corpus, Document
from kraken.data.files import SECTION_BYTES, WHOLE_TEXT_BYTES, FilesCorpus
from kraken.data.huggingface import HuggingFaceCorpus
from kraken.data.nanogpt import NanoGptFolder
from kraken.data.prepare import adopt_nanogpt
from kraken.data.shards import TokenShards
from kraken.manifest import ArtefactError
from kraken.tokenizer import Tokenizer

TEXTS = [f"text {i} naïve 漢字 " + "word " * (i % 50) for i in range(300)]


def read(corpus: Corpus, bytes_per_piece: int = 2**20, on_bad: Any = pytest.fail) -> list[Document]:
    return [document for piece in corpus.pieces(bytes_per_piece) for document in corpus.read(piece, on_bad)]


def texts(corpus: Corpus, bytes_per_piece: int = 2**20) -> list[str]:
    return [document.text for document in read(corpus, bytes_per_piece)]


def jsonl(rows: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in rows).encode()


def files(*paths: Path | str, **options: str) -> FilesCorpus:
    return FilesCorpus(tuple(str(path) for path in paths), **options)


class TestFinding:
    def test_files_globs_folders_and_uris_find_the_same(self, tmp_path: Path) -> None:
        (tmp_path / "a" / "b").mkdir(parents=True)
        for name in ("a/x.txt", "a/b/y.md", "a/b/z.jsonl", "a/.hidden.txt", "a/picture.png", "a/_tmp.txt"):
            (tmp_path / name).write_bytes(jsonl([name]) if name.endswith("jsonl") else name.encode())
        expected = ["a/b/y.md", "a/b/z.jsonl", "a/x.txt"]
        assert texts(files(tmp_path)) == expected
        assert texts(files(tmp_path.as_uri())) == expected
        assert texts(files(f"{tmp_path}/**/*.*[tdl]")) == expected
        assert texts(files(f"{tmp_path.as_uri()}/a/*.txt", tmp_path / "a" / "x.txt")) == ["a/x.txt"]
        assert [d.name for d in read(files(tmp_path / "a" / "x.txt"))] == ["x.txt"]

    def test_what_cannot_be_found_or_read_says_so(self, tmp_path: Path) -> None:
        (tmp_path / "x.png").write_bytes(b"\x89PNG")
        (tmp_path / "x.txt.gz").write_bytes(b"")
        for path in (tmp_path, tmp_path / "missing", f"{tmp_path}/*.txt"):
            with pytest.raises(ConfigError, match="matches no file to read"):
                _ = files(path).fingerprint
        with pytest.raises(ConfigError, match="is packed; only JSONL"):
            _ = files(f"{tmp_path}/*.gz").fingerprint
        with pytest.raises(ConfigError, match="cannot be opened"):
            _ = files("gopher://host/x").fingerprint

    @pytest.mark.parametrize("name", ["corpus [v2]", "what?", "all*", "[ab]"])
    def test_what_exists_under_the_very_name_is_no_glob(self, tmp_path: Path, name: str) -> None:
        folder = tmp_path / name
        (folder / "sub").mkdir(parents=True)
        (folder / "x.jsonl").write_bytes(jsonl(["one"]))
        (folder / "sub" / "y [1].txt").write_text("two")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "x.jsonl").write_bytes(jsonl(["what the glob [ab] matches"]))
        assert texts(files(folder)) == ["two", "one"]
        assert texts(files(folder / "x.jsonl")) == ["one"]
        assert texts(files(folder / "sub" / "y [1].txt")) == ["two"]
        assert texts(files(f"{folder}/*.jsonl")) == texts(files(f"{folder}/**/x.*")) == ["one"]
        if "?" not in name:  # which begins the options of a URI
            assert texts(files(f"{tmp_path.as_uri()}/{name}/*.jsonl")) == ["one"]

    def test_a_link_to_a_folder_around_it_is_not_followed(self, tmp_path: Path) -> None:
        folder = tmp_path / "corpus"
        (folder / "sub").mkdir(parents=True)
        for index in range(5):
            (folder / f"{index}.jsonl").write_bytes(jsonl([f"text {index}"]))
        (folder / "sub" / "5.jsonl").write_bytes(jsonl(["text 5"]))
        (folder / "again").symlink_to(".")
        (folder / "sub" / "up").symlink_to(folder)
        (folder / "sub" / "itself").symlink_to("../sub")
        expected = [f"{index}.jsonl:0" for index in range(5)] + ["sub/5.jsonl:0"]
        assert [d.name for d in read(files(folder))] == expected
        assert [d.name for d in read(files(folder.as_uri()))] == expected
        assert [d.name for d in read(files(f"{folder}/**/*.jsonl"))] == expected
        assert len(read(files(folder, folder / "again", f"{folder}/sub/../*.jsonl"))) == 6

    def test_a_file_with_several_names_is_read_once(self, tmp_path: Path) -> None:
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "x.txt").write_text("one")
        (tmp_path / "a.txt").symlink_to("b/x.txt")
        (tmp_path / "a").symlink_to("b")
        os.link(tmp_path / "b" / "x.txt", tmp_path / "b" / "y.txt")
        assert [d.name for d in read(files(tmp_path))] == ["b/x.txt"]
        assert texts(files(tmp_path / "a.txt", tmp_path / "b" / ".." / "a" / "y.txt", tmp_path)) == ["one"]
        # what a glob names is found by that name, though it is a link
        assert [d.name for d in read(files(f"{tmp_path}/a/*.txt"))] == ["x.txt"]
        assert [d.name for d in read(files(f"{tmp_path}/a*/x.txt"))] == ["a/x.txt"]
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "x.txt").write_text("one")  # an equal file is another one
        assert texts(files(tmp_path)) == ["one", "one"]

    def test_names_that_are_no_files(self, tmp_path: Path) -> None:
        (tmp_path / "x.txt").write_text("one")
        (tmp_path / "folder.txt").mkdir()
        os.mkfifo(tmp_path / "pipe.txt")
        assert texts(files(tmp_path)) == ["one"]
        with pytest.raises(ConfigError, match="pipe.txt matches no file to read"):
            texts(files(tmp_path / "pipe.txt"))
        for target in ("missing.txt", "lost.txt"):  # a link to itself leads nowhere, too
            (tmp_path / "lost.txt").symlink_to(target)
            with pytest.raises(ConfigError, match=f"lost.txt, a link to {target}, which does not exist; restore"):
                texts(files(tmp_path))
            (tmp_path / "lost.txt").unlink()
        (tmp_path / "lost.png").symlink_to("missing.png")
        assert texts(files(tmp_path)) == ["one"]
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("two")
        with pytest.raises(ConfigError, match=r"caf\\xe9.txt', whose name is not UTF-8; rename it"):
            texts(files(tmp_path))

    def test_the_fingerprint_follows_names_sizes_and_times(self, tmp_path: Path) -> None:
        (tmp_path / "x.txt").write_text("one")
        first = files(tmp_path).fingerprint
        assert files(tmp_path).fingerprint == first
        os.utime(tmp_path / "x.txt", ns=(1, 1))
        second = files(tmp_path).fingerprint
        (tmp_path / "x.txt").rename(tmp_path / "y.txt")
        assert len({first, second, files(tmp_path).fingerprint}) == 3


class TestJsonl:
    @pytest.mark.parametrize("bytes_per_piece", [1, 20_000, 2**20])
    def test_every_line_once_wherever_the_cuts_fall(self, tmp_path: Path, bytes_per_piece: int) -> None:
        content = jsonl(TEXTS)
        # a line that begins exactly at a cut, and one that reaches over several
        start = json.dumps({"text": "x" * (SECTION_BYTES - 13)}) + "\n"
        assert len(start) == SECTION_BYTES
        (tmp_path / "a.jsonl").write_bytes(start.encode() + jsonl(["long " * 8000]) + content)
        (tmp_path / "b.jsonl").write_bytes(content.rstrip(b"\n"))
        found = read(files(tmp_path), bytes_per_piece)
        assert [d.text for d in found] == ["x" * (SECTION_BYTES - 13), "long " * 8000, *TEXTS, *TEXTS]
        assert found == read(files(tmp_path))  # names too
        assert len({d.name for d in found}) == len(found)

    def test_packed_lines_are_the_same_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS)))
        with pa.CompressedOutputStream(str(tmp_path / "b.json.zst"), "zstd") as stream:
            stream.write(jsonl(TEXTS))
        assert texts(files(tmp_path)) == TEXTS * 2
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS))[:-100])
        with pytest.raises(ArtefactError, match="a.jsonl.gz cannot be read"):
            texts(files(tmp_path))

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b'{"text": "\xff"}', "x.jsonl, byte 14: not UTF-8 .* byte 10"),
            (b'{"text": ', "x.jsonl, byte 14: not a JSON object on one line"),
            (b'{"body": "a", "id": 1}', "byte 14: no text in field 'text' .*; its fields are body, id"),
            (b'{"text": null}', "no text in field 'text'"),
            (b'["a"]', "no text in field 'text' .*; it is no object"),
        ],
    )
    def test_a_bad_line_is_named_and_the_others_are_read(self, tmp_path: Path, line: bytes, message: str) -> None:
        (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n' + line + b"\n" + jsonl(["b"]))
        bad: list[str] = []
        assert [d.text for d in read(files(tmp_path), on_bad=bad.append)] == ["a", "b"]
        assert len(bad) == 1 and re.search(message, bad[0]) and bad[0].startswith(str(tmp_path))


class TestText:
    @pytest.mark.parametrize("seed", range(4))
    def test_sections_are_the_whole_text_in_order(self, tmp_path: Path, seed: int) -> None:
        rng = random.Random(seed)
        line_lengths = [(0, 60), (0, 3 * SECTION_BYTES), (SECTION_BYTES - 2, SECTION_BYTES), (10**6, 10**6)][seed]
        text = ""
        while len(text) < WHOLE_TEXT_BYTES + SECTION_BYTES:
            text += "".join(rng.choices("aé漢🙂", k=rng.randint(*line_lengths))) + "\n"
        text = text if seed % 2 else text.rstrip("\n")
        (tmp_path / "x.txt").write_text(text)
        whole = read(files(tmp_path))
        assert "".join(d.text for d in whole) == text
        assert [d.ends for d in whole] == [False] * (len(whole) - 1) + [True]
        assert max(len(d.text.encode()) for d in whole) < 2 * SECTION_BYTES
        assert read(files(tmp_path), 1) == read(files(tmp_path), 50_000) == whole

    def test_sections_begin_with_a_line(self, tmp_path: Path) -> None:
        lines = [f"line {i}\n" for i in range(60_000)]
        (tmp_path / "x.txt").write_text("".join(lines))
        sections = texts(files(tmp_path))
        assert len(sections) > 60 and all(s.startswith("line ") and s.endswith("\n") for s in sections)

    def test_small_files_are_documents(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes("\ufefföne\r\ntwo".encode())
        (tmp_path / "b.txt").write_text("")
        (tmp_path / "c.md").write_text("three")
        assert read(files(tmp_path)) == [Document("a.txt", "öne\r\ntwo"), Document("c.md", "three")]

    def test_other_encodings_are_named_with_their_byte(self, tmp_path: Path) -> None:
        (tmp_path / "x.txt").write_bytes("naïve".encode("latin-1"))
        bad: list[str] = []
        assert read(files(tmp_path), on_bad=bad.append) == []
        assert bad == [f"{tmp_path}/x.txt, byte 2: not UTF-8 (invalid continuation byte)"]

    @pytest.mark.parametrize("num_lines", [100, 2_000, 40_000])
    def test_a_lone_text_is_cut_whatever_its_length(self, tmp_path: Path, num_lines: int) -> None:
        text = "".join(f"line {i} of a text\n" for i in range(num_lines))
        path = tmp_path / "x.txt"
        path.write_text(text)
        sections = read(files(path))
        assert "".join(d.text for d in sections) == text and all(d.text.startswith("line") for d in sections)
        assert len(sections) >= min(len(text) // 1100, 90)
        assert [d.ends for d in sections] == [False] * (len(sections) - 1) + [True]
        assert read(files(path), 1) == read(files(path), 3000) == sections
        (tmp_path / "y.txt").write_text("another")
        assert (len(read(files(tmp_path))) == 2) == (len(text) <= WHOLE_TEXT_BYTES)

    def test_a_file_that_changes_meanwhile_is_noticed(self, tmp_path: Path) -> None:
        (tmp_path / "x.txt").write_text("one")
        [piece] = files(tmp_path).pieces(100)
        (tmp_path / "x.txt").write_text("other")
        with pytest.raises(ArtefactError, match="x.txt has changed since"):
            list(files(tmp_path).read(piece, pytest.fail))


class TestParquet:
    @pytest.mark.parametrize("bytes_per_piece", [1, 3000, 2**20])
    def test_every_row_once_wherever_the_cuts_fall(self, tmp_path: Path, bytes_per_piece: int) -> None:
        for name in ("a", "b"):
            table = pa.table({"id": list(range(300)), "text": TEXTS})
            pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=70)
        found = read(files(tmp_path), bytes_per_piece)
        assert [d.text for d in found] == TEXTS * 2
        assert [d.name for d in found[299:301]] == ["a.parquet:299", "b.parquet:0"]

    def test_bad_rows_columns_and_files_are_named(self, tmp_path: Path) -> None:
        path = tmp_path / "x.parquet"
        array = pa.array([b"one", b"\xff", None, b"two"]).view(pa.string())
        pq.write_table(pa.table({"text": array, "id": [1, 2, 3, 4]}), path)
        bad: list[str] = []
        assert [d.text for d in read(files(path), on_bad=bad.append)] == ["one", "two"]
        assert [reason.split(": ")[0] for reason in bad] == [f"{path}, row 1", f"{path}, row 2"]
        with pytest.raises(ConfigError, match=r"no column 'body'; choose data.text_field from \['text', 'id'\]"):
            read(files(path, text_field="body"))
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ArtefactError, match="x.parquet cannot be read"):
            read(files(path))


class TestDamage:
    """Damaged files end in an error that names them, or in bad documents: in no error of a library."""

    @pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet"])
    def test_random_bytes_are_errors_that_name_the_file(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / f"x.{kind}"
        if kind == "parquet":
            pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=70)
        else:
            with pa.CompressedOutputStream(str(path), {"gz": "gzip", "zst": "zstd"}[kind[-3:].strip(".")]) as stream:
                stream.write(jsonl(TEXTS))
        whole = path.read_bytes()
        rng = random.Random(0)
        num_errors = 0
        for _ in range(60):
            content = bytearray(whole)
            for _ in range(rng.choice([1, 20])):
                content[rng.randrange(len(content))] = rng.randrange(256)
            path.write_bytes(content if rng.random() < 0.7 else whole[: rng.randrange(len(whole))])
            try:
                read(files(path), on_bad=lambda message: None)
            except (ArtefactError, ConfigError) as error:
                assert str(path) in str(error) or "matches no file" in str(error)
                num_errors += 1
        assert num_errors > 20

    def test_every_cut_of_a_packed_file_is_noticed(self, tmp_path: Path) -> None:
        with pa.CompressedOutputStream(str(tmp_path / "x.jsonl.zst"), "zstd") as stream:
            stream.write(jsonl(TEXTS))
        for path, whole in (
            (tmp_path / "x.jsonl.zst", (tmp_path / "x.jsonl.zst").read_bytes()),
            (tmp_path / "x.jsonl.gz", gzip.compress(jsonl(TEXTS))),
        ):
            for length in (len(whole) - 1, len(whole) - 9, len(whole) // 2, 3):
                path.write_bytes(whole[:length])
                with pytest.raises(ArtefactError, match=f"{path.name} cannot be read"):
                    texts(files(path))
            path.write_bytes(whole + whole)  # several packed one after the other are one file
            assert texts(files(path)) == TEXTS * 2

    @pytest.mark.parametrize("error", [UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), KeyError("x")])
    def test_an_error_of_python_inside_arrow_names_the_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        """Rare: a random byte in a footer's names, once in some thousand."""
        path = tmp_path / "x.parquet"
        pq.write_table(pa.table({"text": TEXTS}), path)

        def fail(*args: Any, **options: Any) -> None:
            raise error

        monkeypatch.setattr(pq, "ParquetFile", fail)
        with pytest.raises(ArtefactError, match="x.parquet cannot be read"):
            read(files(path))

    def test_deep_json_and_huge_numbers_are_bad_documents(self, tmp_path: Path) -> None:
        rows = [b'{"text": "a"}', b"[" * 10**6, b'{"text": ' + b"9" * 10**5 + b"}", b'{"a": ' * 10**5, b'{"text": "b"}']
        (tmp_path / "x.jsonl").write_bytes(b"\n".join(rows))
        bad: list[str] = []
        assert [d.text for d in read(files(tmp_path), on_bad=bad.append)] == ["a", "b"]
        assert len(bad) == 3 and max(map(len, bad)) < 1000


class TestHuggingFace:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "dataset"
        folder.mkdir()
        for index in range(3):
            table = pa.table({"text": TEXTS[index * 100 : index * 100 + 100], "id": list(range(100))})
            pq.write_table(table, folder / f"train-{index:05d}.parquet", row_group_size=30)
        return folder

    def test_a_local_folder_is_streamed_shard_by_shard(self, folder: Path) -> None:
        config = DataConfig(corpus="huggingface", dataset=str(folder))
        corpus = HuggingFaceCorpus(config)
        assert len(corpus.pieces(1)) == 3
        assert texts(corpus) == TEXTS
        assert len({d.name for d in read(HuggingFaceCorpus(config))}) == 300
        first = corpus.fingerprint
        (folder / "train-00000.parquet").touch()
        changed = HuggingFaceCorpus(config)
        assert changed.fingerprint != first
        with pytest.raises(ArtefactError, match="the work was planned for"):
            list(changed.read(corpus.pieces(1)[0], pytest.fail))

    @pytest.mark.parametrize("kind", ["parquet", "jsonl.gz", "jsonl.zst", "jsonl"])
    def test_a_damaged_file_is_an_error_that_says_so(self, tmp_path: Path, kind: str) -> None:
        folder = tmp_path / "data"
        folder.mkdir()
        path = folder / f"train.{kind}"
        if kind == "parquet":
            pq.write_table(pa.table({"text": TEXTS}), path, compression="zstd")
        elif kind == "jsonl":
            path.write_bytes(jsonl(TEXTS))
        else:
            with pa.CompressedOutputStream(str(path), {"gz": "gzip", "zst": "zstd"}[kind[-3:].strip(".")]) as stream:
                stream.write(jsonl(TEXTS))
        content = bytearray(path.read_bytes())
        middle = len(content) // 3
        content[middle : middle + 8] = b"\xff\xfe\xfd\xfc{{{{"
        path.write_bytes(content)
        with pytest.raises(ArtefactError, match="data cannot be read"):
            texts(HuggingFaceCorpus(DataConfig(corpus="huggingface", dataset=str(folder))))

    def test_a_wrong_split_column_or_configuration_is_named(self, folder: Path) -> None:
        for changes, message in (
            ({"dataset_split": "test"}, "data.dataset_split=test does not exist"),
            ({"text_field": "body"}, "no column 'body'; choose data.text_field from .*text"),
            ({"dataset_config": "other"}, "data.dataset_config=other"),
        ):
            config = DataConfig(corpus="huggingface", dataset=str(folder), **changes)  # type: ignore[arg-type]
            with pytest.raises(ConfigError, match=message):
                _ = HuggingFaceCorpus(config).fingerprint
                HuggingFaceCorpus(config).pieces(1)

    def test_offline_the_error_names_the_ways_and_a_cache_is_one(self, folder: Path, tmp_path: Path) -> None:
        """In a process of its own, since `datasets` reads its environment once."""
        code = """
import datasets, sys
from kraken.config import DataConfig
from kraken.data.huggingface import HuggingFaceCorpus
from kraken.manifest import ArtefactError
try:
    HuggingFaceCorpus(DataConfig(corpus="huggingface", dataset="openwebtext")).fingerprint
except ArtefactError as error:
    print(error)
datasets.load_dataset(sys.argv[1])  # fills the cache
corpus = HuggingFaceCorpus(DataConfig(corpus="huggingface", dataset="dataset"))
print(sum(1 for piece in corpus.pieces(1) for _ in corpus.read(piece, sys.exit)))
"""
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", code, str(folder)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        missing, cached = result.stdout.splitlines()
        for way in ("data.dataset=openwebtext", "cannot be reached", "HF_HOME", "--data.corpus files", "embedded"):
            assert way in missing
        assert cached == "300"


class TestNanoGpt:
    @pytest.fixture
    def gpt2(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tokenizer:
        """A tokenizer of 300 ids in the place of GPT-2's, which would be a download."""
        documents = tiny.corpus(tmp_path / "corpus").documents
        tokenizer = Tokenizer.train((document.text for document in documents), 300)
        monkeypatch.setattr(Tokenizer, "gpt2", classmethod(lambda cls: tokenizer))
        return tokenizer

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "openwebtext"
        folder.mkdir()
        np.arange(0, 301, dtype=np.uint16).tofile(folder / "train.bin")
        np.array([1, 1, 2, 300], dtype=np.uint16).tofile(folder / "val.bin")
        return folder

    def config(self, path: Path | str) -> DataConfig:
        return DataConfig(corpus="nanogpt", paths=(str(path),), tokenizer="gpt2")

    @pytest.mark.parametrize("as_uri", [False, True])
    def test_its_files_are_the_shards(self, gpt2: Tokenizer, folder: Path, tmp_path: Path, as_uri: bool) -> None:
        target = tmp_path / "artefact"
        target.mkdir()
        metrics, _ = adopt_nanogpt(self.config(folder.as_uri() if as_uri else folder), target)
        shards = TokenShards(target, "train", 301)
        assert shards.read(0, 301).tolist() == list(range(301))
        assert (metrics["validation_tokens"].value, metrics["train_documents"].value) == (4, 1)
        assert metrics["unigram_entropy"].value == pytest.approx(1.5 * np.log(2))
        assert (target / "train_000000.bin").samefile(folder / "train.bin") or as_uri

    def test_other_ids_truncated_and_missing_files_are_refused(
        self, gpt2: Tokenizer, folder: Path, tmp_path: Path
    ) -> None:
        target = tmp_path / "artefact"
        target.mkdir()
        np.array([1, 301], dtype=np.uint16).tofile(folder / "val.bin")
        with pytest.raises(ArtefactError, match="val.bin holds id 301, past the 301 ids of GPT-2"):
            adopt_nanogpt(self.config(folder), target)
        assert not (target / "validation_000000.bin").exists() and (folder / "val.bin").is_file()
        for content in (b"\0\0\0", b""):
            (folder / "val.bin").write_bytes(content)
            with pytest.raises(ArtefactError, match="no whole number of tokens"):
                adopt_nanogpt(self.config(folder), target)
        (folder / "meta.pkl").write_bytes(b"")
        with pytest.raises(ConfigError, match="vocabulary of its own"):
            _ = NanoGptFolder(str(folder)).fingerprint
        (folder / "val.bin").unlink()
        with pytest.raises(ConfigError, match="holds no val.bin"):
            _ = NanoGptFolder(str(folder)).fingerprint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corpus": "files"}, "data.corpus=files needs data.paths"),
        ({"corpus": "huggingface"}, "data.corpus=huggingface needs data.dataset"),
        ({"paths": ("/a",)}, "data.paths=.* is not read by data.corpus=embedded"),
        ({"corpus": "files", "paths": ("/a",), "dataset": "b"}, "data.dataset=b is not read by data.corpus=files"),
        ({"on_bad_document": "skip"}, "data.on_bad_document=skip is not read by data.corpus=embedded"),
        ({"corpus": "files", "paths": ("a/b",)}, "data.paths=a/b is relative.*; give /.*/a/b"),
        ({"corpus": "huggingface", "dataset": "./b"}, "data.dataset=./b is relative"),
        ({"corpus": "huggingface", "dataset": "/b", "dataset_revision": "main"}, "is a local folder"),
        ({"corpus": "nanogpt", "paths": ("/a",)}, "data.tokenizer=trained; choose data.tokenizer=gpt2"),
        ({"corpus": "nanogpt", "paths": ("/a", "/b"), "tokenizer": "gpt2"}, "reads one folder"),
        ({"bytes_per_piece": 0}, "data.bytes_per_piece=0 is not positive"),
    ],
)
def test_settings_that_do_not_fit_the_corpus_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**settings)


def test_paths_survive_json() -> None:
    from kraken.config import from_dict, to_json

    config = DataConfig(corpus="files", paths=("/a", "s3://b/*.jsonl?region=x"), text_field="body")
    assert from_dict(DataConfig, json.loads(to_json(config))) == config
    assert dataclasses.replace(config, text_field="text") != config
