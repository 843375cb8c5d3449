"""The tokenizer: a tiktoken encoding, trained here (rustbpe) or GPT-2's; saved as text, never as a pickle."""

import base64
import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken

from kraken.manifest import ArtefactError, write_atomically

END_OF_TEXT = "<|endoftext|>"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""GPT-2's split pattern, as tiktoken spells it."""

RANKS_NAME = "ranks.tiktoken"
META_NAME = "tokenizer_meta.json"


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
            ArtefactError: the text is too small to yield `num_ids` ids.
        """
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(iter(documents), num_ids, pattern=GPT2_PATTERN)
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
        """Ids of a text, without the end-of-text id."""
        return self._encoding.encode_ordinary(text)

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of a text, without the end-of-text id; uint32 [tokens]. The same as `encode`, without a list of objects.

        Raises:
            UnicodeEncodeError: the text holds half of a surrogate pair, which no UTF-8 text does.
        """
        return self._encoding.encode_to_numpy(text, allowed_special=frozenset(), disallowed_special=())

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
