"""The tokenizer: a tiktoken encoding, trained here (rustbpe) or GPT-2's; saved as text, never as a pickle."""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken

from kraken.manifest import ArtefactError, write_atomically

END_OF_TEXT = "<|endoftext|>"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""GPT-2's split pattern, as tiktoken spells it."""

BLANKS = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""The characters that `\\s` of the pattern matches, as a character class; Python's own `\\s` matches others too."""
BLANK, NOT_BLANK = re.compile(f"[{BLANKS}]"), re.compile(f"[^{BLANKS}]")

CUT_BLANKS = 2**16
"""A run of more than twice as many blanks is cut off before its last one. The regular expressions of tiktoken and
rustbpe backtrack over such a run and give up at about a million characters."""

RANKS_NAME = "ranks.tiktoken"
META_NAME = "tokenizer_meta.json"


class EncodingError(ValueError):
    """A text cannot be encoded; the message says why, and the caller adds which text."""


class Tokenizer:
    """Text to ids and back. `<|endoftext|>` in a text is ordinary text; only `eot_id` itself ends a document.

    Args:
        ranks: token bytes -> id, 0 to len(ranks) - 1.
        pattern: the regular expression that splits text before merging.
        name: what the encoding is called in messages.
    """

    def __init__(self, ranks: dict[bytes, int], pattern: str, name: str):
        self.name = name
        self.pattern = pattern
        self.ranks = ranks
        self.eot_id = len(ranks)
        self.num_ids = len(ranks) + 1
        self._encoding = tiktoken.Encoding(
            name=name,
            pat_str=pattern,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.eot_id},
            explicit_n_vocab=self.num_ids,
        )

    @classmethod
    def train(cls, documents: Iterable[str], num_ids: int) -> "Tokenizer":
        """Train byte-pair ranks on documents; the same documents give the same ranks.

        Raises:
            ArtefactError: the text is too small to yield `num_ids` ids, or rustbpe fails on it.
            UnicodeEncodeError: a document holds half of a surrogate pair.
        """
        trainer = rustbpe.Tokenizer()
        parts = (part for document in documents for part in cut_at_blanks(document))
        try:
            trainer.train_from_iterator(parts, num_ids, pattern=GPT2_PATTERN)
        except BaseException as error:
            if not is_panic(error):
                raise
            raise ArtefactError(
                f"rustbpe cannot train on this corpus ({first_line(error)}); choose data.tokenizer=gpt2, or leave the "
                "strangest documents out"
            ) from error
        ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
        if len(ranks) != num_ids:
            raise ArtefactError(
                f"data.num_trained_ids={num_ids}, but the corpus yields only {len(ranks)} byte pairs; "
                f"lower data.num_trained_ids or give more text"
            )
        return cls(ranks, GPT2_PATTERN, f"bpe{num_ids}")

    @classmethod
    def gpt2(cls) -> "Tokenizer":
        """OpenAI's GPT-2 encoding; tiktoken downloads its ranks once.

        Raises:
            ArtefactError: the ranks are neither cached nor reachable.
        """
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:
            raise ArtefactError(
                f"data.tokenizer=gpt2 needs GPT-2's ranks, which could not be had ({type(error).__name__}); on a "
                "machine without network set TIKTOKEN_CACHE_DIR to a folder that holds vocab.bpe as "
                "6d1cbeee0f20b3d9449abfede4726ed8212e3aee and encoder.json as "
                "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6, or choose data.tokenizer=trained"
            ) from error
        return cls(encoding._mergeable_ranks, encoding._pat_str, "gpt2")

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides which ids a text becomes."""
        digest = hashlib.sha256(json.dumps([self.pattern, END_OF_TEXT, self.eot_id]).encode())
        for token in sorted(self.ranks, key=self.ranks.__getitem__):
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without the end-of-text id; half of a surrogate pair becomes U+FFFD.

        Raises:
            EncodingError: tiktoken cannot encode the text.
        """
        # Not tiktoken's `encode_ordinary`: where `encode_to_numpy` raises, that panics.
        try:
            ids = self.encode_array(text)
        except UnicodeEncodeError:
            ids = self.encode_array(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        found: list[int] = ids.tolist()
        return found

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of a text, without the end-of-text id; uint32 [tokens]. The same as `encode`, without a list of objects.

        Raises:
            EncodingError: tiktoken cannot encode the text.
            UnicodeEncodeError: the text holds half of a surrogate pair, which no UTF-8 text does.
        """
        parts = cut_at_blanks(text) if self.pattern == GPT2_PATTERN else [text]
        try:
            ids = [
                self._encoding.encode_to_numpy(part, allowed_special=frozenset(), disallowed_special=())
                for part in parts
            ]
        except UnicodeEncodeError:
            raise
        except BaseException as error:
            if not (isinstance(error, ValueError) or is_panic(error)):
                raise
            raise EncodingError(f"tiktoken cannot encode these {len(text)} characters: {first_line(error)}") from error
        return ids[0] if len(ids) == 1 else np.concatenate(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of the ids, exact."""
        return self._encoding.decode_bytes(list(ids))

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one id; the end-of-text id is its own name."""
        return self._encoding.decode_single_token_bytes(token_id)

    def save(self, folder: Path) -> None:
        """Write the ranks in tiktoken's own text format, and what else defines the encoding as JSON."""
        lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in self.ranks.items()]
        write_atomically(folder / RANKS_NAME, "".join(lines))
        meta = {
            "name": self.name,
            "pattern": self.pattern,
            "end_of_text": END_OF_TEXT,
            "eot_id": self.eot_id,
            "fingerprint": self.fingerprint,
        }
        write_atomically(folder / META_NAME, json.dumps(meta, indent=2))

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read what `save` wrote.

        Raises:
            ArtefactError: a file is missing, damaged, or does not match the recorded fingerprint.
        """
        try:
            meta = json.loads((folder / META_NAME).read_text())
            lines = (folder / RANKS_NAME).read_text().splitlines()
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in map(str.split, lines)}
            tokenizer = cls(ranks, meta["pattern"], meta["name"])
        except FileNotFoundError as error:
            raise ArtefactError(
                f"{error.filename} is missing: {folder} holds no tokenizer; run the stage again"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ArtefactError(f"the tokenizer in {folder} is damaged ({error}); run the stage again") from error
        require_same_tokenizer(tokenizer.fingerprint, meta["fingerprint"], f"the ranks in {folder}", META_NAME)
        return tokenizer


def cut_at_blanks(text: str) -> Iterator[str]:
    """Cut a text within very long runs of blanks, such that its parts together have exactly the text's tokens.

    GPT2_PATTERN splits a run of blanks that other text follows before its last blank, so that cutting there changes no
    token. Text without such a run comes back whole.
    """
    start = 0
    for position in range(0, len(text), CUT_BLANKS):  # a run of twice the length holds one of these and its length
        if position < start or not BLANK.match(text, position):
            continue
        following = NOT_BLANK.search(text, position)
        if following is None:
            break  # a run at the text's end is one piece, matched without backtracking
        if following.start() - position > CUT_BLANKS:
            yield text[start : following.start() - 1]
            start = following.start() - 1
    yield text[start:]


def is_panic(error: BaseException) -> bool:
    """Whether a Rust library panicked: an exception of pyo3 that cannot be imported and is no `Exception`."""
    return type(error).__name__ == "PanicException"


def first_line(error: BaseException) -> str:
    """An error's message without what follows its first line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def require_same_tokenizer(found: str, expected: str, what: str, other: str) -> None:
    """Refuse to mix ids of two tokenizers.

    Raises:
        ArtefactError: the fingerprints differ.
    """
    if found != expected:
        raise ArtefactError(
            f"{what} belongs to tokenizer {found[:12]}, but {other} to {expected[:12]}; "
            "use artefacts of one run, or run the pipeline from prepare on"
        )
