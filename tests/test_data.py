"""Corpora, tokenizer, shards and loader."""

import collections
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiny
import tokenizers

import kraken.tokenizer
from kraken.data.corpus import split_of
from kraken.data.embedded import EmbeddedCorpus
from kraken.data.loader import Loader, sequential_windows
from kraken.data.prepare import unigram_entropy
from kraken.data.shards import ShardWriter, TokenShards, shard_name
from kraken.huggingface.tokenizer import fast_tokenizer
from kraken.manifest import ArtefactError
from kraken.tokenizer import BLANK, CUT_BLANKS, END_OF_TEXT, RANKS_NAME, EncodingError, Tokenizer, cut_at_blanks


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    documents = tiny.corpus(tmp_path_factory.mktemp("corpus")).documents
    return Tokenizer.train((document.text for document in documents), 300)


class TestCorpus:
    def test_the_embedded_corpus_is_the_standard_library(self) -> None:
        corpus = EmbeddedCorpus()
        names = {document.name for document in corpus.documents}
        assert "argparse.py" in names and "json/decoder.py" in names
        assert not [n for n in names if {"test", "tests", "site-packages"} & set(n.split("/"))]
        num_bytes = sum(len(document.text.encode()) for document in corpus.documents)
        assert 500 < len(names) < 1500 and 8e6 < num_bytes < 30e6

    def test_fingerprint_follows_the_content(self, tmp_path: Path) -> None:
        first = tiny.corpus(tmp_path).fingerprint
        assert EmbeddedCorpus(tmp_path).fingerprint == first
        (tmp_path / "document_000.py").write_text("changed")
        assert EmbeddedCorpus(tmp_path).fingerprint != first

    def test_the_split_of_a_document_depends_on_its_text_alone(self) -> None:
        texts = [str(index).encode() for index in range(10_000)]
        held_out = [text for text in texts if split_of(text, 0.05) == "validation"]
        assert 400 < len(held_out) < 600
        assert all(split_of(text, 0.1) == "validation" for text in held_out)

    def test_pieces_hold_every_document_once_in_order(self, tmp_path: Path) -> None:
        corpus = tiny.corpus(tmp_path)
        for bytes_per_piece in (1, 3000, 2**20):
            pieces = corpus.pieces(bytes_per_piece)
            read = [document for piece in pieces for document in EmbeddedCorpus(tmp_path).read(piece, pytest.fail)]
            assert tuple(read) == corpus.documents
            assert [piece.index for piece in pieces] == list(range(len(pieces)))
        assert len(corpus.pieces(1)) == 40 and len(corpus.pieces(2**20)) == 1

    def test_another_machine_s_library_is_noticed(self, tmp_path: Path) -> None:
        [piece] = tiny.corpus(tmp_path).pieces(2**20)
        (tmp_path / "document_000.py").write_text("changed")
        with pytest.raises(ArtefactError, match="differs from that of the machine which planned"):
            list(EmbeddedCorpus(tmp_path).read(piece, pytest.fail))

    def test_no_documents_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ArtefactError, match="found no .py files"):
            _ = EmbeddedCorpus(tmp_path).documents


class TestTokenizer:
    @pytest.mark.parametrize("text", ["", "def f(x):\n\treturn x", "naïve 漢字 🙂\x00\r\n", f"a {END_OF_TEXT} b"])
    def test_round_trip_is_exact(self, tokenizer: Tokenizer, text: str) -> None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eot_id not in ids
        assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()

    def test_saved_and_loaded_it_is_the_same(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        tokenizer.save(tmp_path)
        loaded = Tokenizer.load(tmp_path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode("def value 漢字") == tokenizer.encode("def value 漢字")
        assert (loaded.num_ids, loaded.eot_id) == (301, 300)

    def test_training_twice_gives_the_same_ranks(self, tmp_path: Path) -> None:
        texts = [document.text for document in tiny.corpus(tmp_path).documents]
        assert Tokenizer.train(texts, 280).fingerprint == Tokenizer.train(texts, 280).fingerprint

    @pytest.mark.parametrize("text", ["", "def f", f"naïve {END_OF_TEXT} 漢字🙂\n", " " * 5000 + "x" * 5000])
    def test_arrays_hold_the_same_ids_as_lists(self, tokenizer: Tokenizer, text: str) -> None:
        ids = tokenizer.encode_array(text)
        assert ids.dtype == np.uint32 and ids.tolist() == tokenizer.encode(text)

    def test_damaged_and_missing_files_are_refused(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        with pytest.raises(ArtefactError, match="holds no tokenizer"):
            Tokenizer.load(tmp_path)
        tokenizer.save(tmp_path)
        ranks = (tmp_path / RANKS_NAME).read_text().splitlines()
        ranks[260], ranks[261] = ranks[261].split()[0] + " 260", ranks[260].split()[0] + " 261"
        (tmp_path / RANKS_NAME).write_text("\n".join(ranks))
        with pytest.raises(ArtefactError, match="belongs to tokenizer"):
            Tokenizer.load(tmp_path)
        (tmp_path / RANKS_NAME).write_text("not base64 at all")
        with pytest.raises(ArtefactError, match="damaged"):
            Tokenizer.load(tmp_path)

    def test_cutting_long_runs_of_blanks_changes_no_id(
        self, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Against tiktoken on whole texts, where even short runs are cut."""
        rng = random.Random(0)
        for cut_blanks in (1, 2, 5):
            monkeypatch.setattr(kraken.tokenizer, "CUT_BLANKS", cut_blanks)
            num_cut = 0
            for _ in range(300):
                runs = (
                    rng.choice(" \n\t\xa0\u3000") * rng.randint(0, 9) + rng.choice(["a", "'s", "7", "="])
                    for _ in "123456"
                )
                text = "".join(rng.sample("\r  \n", k=rng.randint(0, 4))) + "".join(runs) + " " * rng.randint(0, 6)
                num_cut += len(list(cut_at_blanks(text))) > 1
                assert tokenizer.encode(text) == tokenizer._encoding.encode_ordinary(text)
            assert num_cut > 100

    @pytest.mark.parametrize("num_blanks", [CUT_BLANKS, 2 * CUT_BLANKS, 2 * CUT_BLANKS + 1, 400_000, 900_000])
    def test_below_the_limit_of_its_regular_expression_ids_are_tiktoken_s(
        self, tokenizer: Tokenizer, num_blanks: int
    ) -> None:
        text = "def f" + "\t" * num_blanks + "x" + " \u3000" * (num_blanks // 2) + "\n="
        assert tokenizer.encode(text) == tokenizer._encoding.encode_ordinary(text)
        assert len(list(cut_at_blanks(text))) >= 1 + 2 * (num_blanks > 2 * CUT_BLANKS)

    def test_beyond_it_they_are_those_of_hugging_face(self, tokenizer: Tokenizer) -> None:
        text = "a" + " " * 1_100_000 + "b" + "\n" * 1_100_000
        fast = tokenizers.Tokenizer.from_str(json.dumps(fast_tokenizer(tokenizer)))
        assert tokenizer.encode(text + "c") == fast.encode(text + "c").ids

    def test_blanks_are_what_the_pattern_means(self) -> None:
        """tiktoken keeps only what the pattern matches: here the blanks among all characters."""
        bytes_alone = {bytes([byte]): byte for byte in range(256)}
        encoding = tiktoken.Encoding("blanks", pat_str=r"\s", mergeable_ranks=bytes_alone, special_tokens={})
        everything = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
        assert encoding.decode(encoding.encode_ordinary(everything)) == "".join(BLANK.findall(everything))

    def test_training_reads_long_runs_of_blanks(self) -> None:
        texts = ["def value " * 50, "a" + " " * 1_500_000 + "b"]
        assert b" " * 128 in Tokenizer.train(texts, 268).ranks

    def test_a_text_that_tiktoken_refuses_is_an_encoding_error(self, tokenizer: Tokenizer) -> None:
        other = Tokenizer(tokenizer.ranks, r"\s+(?!\S)|\s|\S+", "other")  # a pattern that nobody cuts text for
        for encode in (other.encode, other.encode_array):
            with pytest.raises(EncodingError, match=r"cannot encode these 1500001 characters: .*[Rr]egex"):
                encode(" " * 1_500_000 + "b")
        assert other.encode("a b") == tokenizer._encoding.encode_ordinary("a") + other.encode(" b")

    def test_half_a_surrogate_pair_becomes_a_replacement_character(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.decode(tokenizer.encode("a \ud83d\ude42 \ud800")) == "a 🙂 \ufffd"

    def test_too_little_text_is_an_error(self) -> None:
        with pytest.raises(ArtefactError, match="yields only"):
            Tokenizer.train(["abc"], 400)

    def test_gpt2_without_ranks_says_how_to_provide_them(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import requests
        import tiktoken.registry

        def offline(*args: object, **kwargs: object) -> None:
            raise requests.ConnectionError("no network")

        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
        monkeypatch.setattr(requests, "get", offline)
        with pytest.raises(ArtefactError, match="TIKTOKEN_CACHE_DIR"):
            Tokenizer.gpt2()


def write_shard(folder: Path, index: int, ids: list[int], num_ids: int) -> None:
    writer = ShardWriter(folder, "train", index, num_ids)
    writer.write(np.array(ids, dtype=np.uint32))
    writer.finish()


class TestShards:
    @pytest.mark.parametrize("size", [1, 10, 64, 370, 1000])
    def test_shards_read_as_one_array_whatever_their_size(self, tmp_path: Path, size: int) -> None:
        for index, start in enumerate(range(0, 370, size)):
            write_shard(tmp_path, index, list(range(start, min(start + size, 370))), 400)
        shards = TokenShards(tmp_path, "train", 400)
        assert shards.num_tokens == 370
        assert shards.read(0, 370).tolist() == list(range(370))
        assert shards.read(63, 5).tolist() == [63, 64, 65, 66, 67]

    def test_a_shard_is_a_flat_little_endian_array(self, tmp_path: Path) -> None:
        write_shard(tmp_path, 0, [1, 258], 300)
        assert (tmp_path / shard_name("train", 0)).read_bytes() == bytes([1, 0, 2, 1])

    def test_large_vocabularies_take_four_bytes(self, tmp_path: Path) -> None:
        write_shard(tmp_path, 0, [70_000], 100_000)
        assert TokenShards(tmp_path, "train", 100_000).read(0, 1).tolist() == [70_000]

    def test_a_shard_exists_whole_or_not_at_all(self, tmp_path: Path) -> None:
        writer = ShardWriter(tmp_path, "train", 0, 300)
        writer.write(np.zeros(2**20, dtype=np.uint32))
        assert not list(tmp_path.glob("train_*"))
        writer.discard()
        empty = ShardWriter(tmp_path, "train", 1, 300)
        empty.finish()
        assert not list(tmp_path.iterdir())

    def test_bad_shards_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ArtefactError, match="holds no train shards"):
            TokenShards(tmp_path, "train", 300)
        with pytest.raises(ArtefactError, match="past the 300 ids"):
            write_shard(tmp_path, 0, [300], 300)
        path = tmp_path / shard_name("train", 0)
        for content in (b"\x01\x00\x02", b""):
            path.write_bytes(content)
            with pytest.raises(ArtefactError, match="truncated"):
                TokenShards(tmp_path, "train", 300)
        path.write_bytes(b"\xff\xff\x02\x00")
        with pytest.raises(ArtefactError, match="shards are damaged"):
            TokenShards(tmp_path, "train", 300).read(0, 2)

    def test_unigram_entropy_is_that_of_the_frequencies(self, tmp_path: Path) -> None:
        write_shard(tmp_path, 0, [0, 0, 1, 2], 300)
        entropy = unigram_entropy(TokenShards(tmp_path, "train", 300))
        assert entropy == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4))


class TestLoader:
    @pytest.fixture
    def shards(self, tmp_path: Path) -> TokenShards:
        for index, start in enumerate(range(0, 1000, 128)):
            write_shard(tmp_path, index, list(range(start, min(start + 128, 1000))), 1000)
        return TokenShards(tmp_path, "train", 1000)

    def test_a_batch_is_a_pure_function_of_seed_and_step(self, shards: TokenShards) -> None:
        first, again, other = (Loader(shards, 16, 8, seed) for seed in (1, 1, 2))
        inputs, targets = first.batch(5)
        first.batch(0)
        assert np.array_equal(again.batch(5)[0], inputs) and np.array_equal(first.batch(5)[0], inputs)
        assert not np.array_equal(other.batch(5)[0], inputs)
        assert np.array_equal(inputs + 1, targets)  # the corpus counts upwards

    @pytest.mark.parametrize("num_ranks", [2, 4])
    def test_ranks_share_the_global_batch(self, shards: TokenShards, num_ranks: int) -> None:
        loader = Loader(shards, 16, 8, seed=1)
        for step in (0, 3, 20):
            parts = [loader.batch(step, rank, num_ranks)[0].numpy() for rank in range(num_ranks)]
            assert np.array_equal(np.concatenate(parts), loader.batch(step)[0].numpy())

    def test_an_epoch_visits_every_window_once_and_the_next_differs(self, shards: TokenShards) -> None:
        loader = Loader(shards, 16, 1, seed=1)
        per_epoch = loader.windows_per_epoch
        epochs = [[loader.window_start(epoch * per_epoch + i) for i in range(per_epoch)] for epoch in (0, 1)]
        for starts in epochs:
            assert len({start % 16 for start in starts}) == 1
            assert len(set(starts)) == per_epoch
            assert max(starts) + 17 <= 1000
        assert epochs[0] != epochs[1]

    def test_too_short_a_split_is_an_error(self, shards: TokenShards) -> None:
        with pytest.raises(ArtefactError, match="shorter than two windows"):
            Loader(shards, 600, 1, seed=1)

    @pytest.mark.parametrize("num_tokens", [2, 16, 17, 18, 100])
    def test_sequential_windows_score_every_token_but_the_first_once(self, num_tokens: int) -> None:
        scored = collections.Counter(
            token for start, length in sequential_windows(num_tokens, 16) for token in range(start + 1, start + length)
        )
        assert scored == collections.Counter(range(1, num_tokens))
