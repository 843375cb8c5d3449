"""The tokenizer as Hugging Face reads it: `tokenizer.json` and `tokenizer_config.json`, made of tiktoken's ranks.

tiktoken merges the two neighbours whose bytes together have the lowest rank. `tokenizers` merges listed pairs, in the
order of the list; so every pair of tokens whose bytes together are a token is listed, by the rank of the result.

One difference is left: transformers reads `<|endoftext|>` inside a text as the end-of-text id, as all its tokenizers
do, while ours takes it for ordinary text.
"""

import json
from pathlib import Path
from typing import Any

from kraken.manifest import ArtefactError, write_atomically
from kraken.tokenizer import END_OF_TEXT, Tokenizer

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"


def write_fast_tokenizer(folder: Path, tokenizer: Tokenizer, context_length: int) -> None:
    """Write both files; `AutoTokenizer.from_pretrained(folder)` reads them."""
    write_atomically(folder / TOKENIZER_NAME, json.dumps(fast_tokenizer(tokenizer), ensure_ascii=False))
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "padding_side": "left",  # a batch's prompts end together, where generation goes on
        "model_input_names": ["input_ids", "attention_mask"],  # otherwise also token types, which the model refuses
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
    }
    write_atomically(folder / TOKENIZER_CONFIG_NAME, json.dumps(values, indent=2))


def fast_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """`tokenizer.json`: split by the pattern, write bytes as characters, merge."""
    spelling = byte_characters()
    spelled = {token: "".join(spelling[byte] for byte in token) for token in tokenizer.ranks}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {
        "type": "Split",
        "pattern": {"Regex": oniguruma(tokenizer.pattern)},
        "behavior": "Isolated",
        "invert": False,
    }
    end_of_text = {"id": tokenizer.eot_id, "content": END_OF_TEXT, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            end_of_text | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a piece that is a token is that token, whatever its merges
            "vocab": {spelled[token]: rank for token, rank in tokenizer.ranks.items()},
            "merges": [[spelled[left], spelled[right]] for left, right in merges(tokenizer.ranks)],
        },
    }


def read_fast_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, which transformers may have written again after reading ours.

    Raises:
        ArtefactError: the file is damaged, or encodes differently from every tokenizer of tiktoken's kind.
    """
    way_out = "give --tokenizer with the folder that the model was loaded from"
    try:
        found = json.loads(path.read_text())
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        spelled = {token: rank for token, rank in found["model"]["vocab"].items() if token != END_OF_TEXT}
        ranks = {bytes(byte_of[character] for character in token): rank for token, rank in spelled.items()}
        pattern = found["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"].replace(r"\z", "$")
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError("its ids are not 0, 1, 2, ...")
        tokenizer = Tokenizer(ranks, pattern, path.parent.name)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ArtefactError(f"{path} cannot be read as a tokenizer of this project ({error!r}); {way_out}") from error
    expected = fast_tokenizer(tokenizer)
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in found["model"]["merges"]]
    special = [(token["id"], token["content"]) for token in found.get("added_tokens", [])]
    checks = {
        "merges": pairs == expected["model"]["merges"],
        "ignore_merges": found["model"].get("ignore_merges") is True,
        "normalizer": found.get("normalizer") is None,
        "pattern": found["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == oniguruma(pattern),
        "added_tokens": special == [(tokenizer.eot_id, END_OF_TEXT)],
    }
    different = [name for name, is_same in checks.items() if not is_same]
    if different:
        raise ArtefactError(f"{path} encodes differently from a tokenizer of this project, in {different}; {way_out}")
    return tokenizer


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every two tokens that together are a token, in the order in which tiktoken prefers them."""
    found: list[tuple[bytes, bytes]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [(left, right) for left, right in pairs if left in ranks and right in ranks]
        found += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return found


def byte_characters() -> list[str]:
    """The printable character that stands for each byte, as GPT-2's files spell it.

    Bytes that are printable in Latin-1 stand for themselves; the others take the characters from U+0100 on, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (chr(code) for code in range(256, 512))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def oniguruma(pattern: str) -> str:
    """A pattern of tiktoken's as Oniguruma means it, where `$` matches before every line break: `\\z` ends the text."""
    parts: list[str] = []
    escaped = in_class = False
    for character in pattern:
        end = character == "$" and not escaped and not in_class
        parts.append(r"\z" if end else character)
        if not escaped:
            in_class = character == "[" or (in_class and character != "]")
        escaped = character == "\\" and not escaped
    return "".join(parts)
