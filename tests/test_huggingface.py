"""Hugging Face: a folder alone gives transformers the same logits and the same tokens as our own model and engine."""

import ast
import asyncio
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import tokenizers
import torch
from test_convert import float32_model
from test_model import VARIANTS

from kraken.config import EngineConfig
from kraken.convert import CODE, CODE_FOLDER, to_exchange, write_folder
from kraken.data.embedded import EmbeddedCorpus
from kraken.engine.engine import TorchEngine
from kraken.engine.protocol import Request, SamplingParams, TokenOutput
from kraken.evaluate import collect
from kraken.huggingface.tokenizer import TOKENIZER_NAME, oniguruma, write_fast_tokenizer
from kraken.manifest import finish_artefact
from kraken.tokenizer import GPT2_PATTERN, Tokenizer
from kraken.trtllm.checkpoint import from_exchange

NUM_IDS = 301
SHAPES = {name: dataclasses.replace(config, vocab_size=320, context_length=32) for name, config in VARIANTS.items()}
NUM_PROMPT, NUM_NEW = 7, 12

OUTSIDE = """
import json, sys
import numpy as np

class NoProject:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("kraken", "pipelines", "jobs", "serve"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoProject())
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
root, names, num_new = sys.argv[1], sys.argv[2].split(","), int(sys.argv[3])
ids = torch.from_numpy(np.load(f"{root}/ids.npy"))
found = {}
for name in names:
    folder = f"{root}/{name}"
    model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(report.values()), report
    assert not model.training
    with torch.inference_mode():
        found[f"{name}.logits"] = model(ids).logits
        found[f"{name}.loss"] = model(ids, labels=ids).loss
    greedy = {"max_new_tokens": num_new, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    everywhere = torch.ones_like(ids)
    found[f"{name}.greedy"] = model.generate(ids, attention_mask=everywhere, **greedy)
    found[f"{name}.uncached"] = model.generate(ids, attention_mask=everywhere, use_cache=False, **greedy)
    found[f"{name}.static"] = model.generate(ids, attention_mask=everywhere, cache_implementation="static", **greedy)
    mask = everywhere.clone()
    mask[0, :3] = 0
    padded = torch.where(mask.bool(), ids, 0)
    found[f"{name}.padded"] = model.generate(padded, attention_mask=mask, **greedy)[:1]
    shorter = ids[:1, 3:]
    found[f"{name}.unpadded"] = model.generate(shorter, attention_mask=torch.ones_like(shorter), **greedy)
    if name == "everything":
        model.save_pretrained(f"{root}/again")
        again = AutoModelForCausalLM.from_pretrained(f"{root}/again", trust_remote_code=True)
        assert torch.equal(again(ids).logits, model(ids).logits)
        with torch.inference_mode():
            found["bfloat16"] = model.bfloat16()(ids).logits.float()
config = AutoConfig.from_pretrained(f"{root}/tensorrt_llm", trust_remote_code=True)
assert config.dtype == torch.bfloat16 and config.architectures == ["KrakenForCausalLM"]
names_of_sizes = ("num_attention_heads", "num_key_value_heads", "head_dim", "kraken_width", "kraken_head_dim")
sizes = {name: getattr(config, name) for name in names_of_sizes}
tokenizer = AutoTokenizer.from_pretrained(f"{root}/{names[0]}", trust_remote_code=True)
text = open(f"{root}/text", newline="").read()
encoded = tokenizer(text).input_ids
assert tokenizer.decode(encoded) == text
assert tokenizer("a<|endoftext|>").input_ids[-1] == tokenizer.eos_token_id == tokenizer.bos_token_id
found["encoded"] = torch.tensor(encoded)
np.savez(f"{root}/found.npz", **{name: tensor.numpy() for name, tensor in found.items()})
json.dump({"is_fast": tokenizer.is_fast, "sizes": sizes}, open(f"{root}/said.json", "w"))
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    corpus = tiny.corpus(tmp_path_factory.mktemp("corpus"))
    return Tokenizer.train((document.text for document in corpus.documents), NUM_IDS - 1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A folder per variant."""
    root = tmp_path_factory.mktemp("folders")
    for name, config in SHAPES.items():
        folder = root / name
        folder.mkdir()
        write_folder(folder, config, to_exchange(float32_model(config)), tokenizer)
        finish_artefact(
            folder,
            started_at=time.monotonic(),
            kind="convert",
            fingerprint=name,
            config={},
            parents={},
            metrics={},
            details={"tokenizer_fingerprint": tokenizer.fingerprint},
        )
    ids = torch.randint(NUM_IDS - 1, (2, NUM_PROMPT), generator=torch.Generator().manual_seed(0))
    np.save(root / "ids.npy", ids.numpy())
    (root / "text").write_text(TRICKY)
    from_exchange(root / "bias", root / "tensorrt_llm")
    return root


@pytest.fixture(scope="module")
def found(root: Path) -> dict[str, torch.Tensor]:
    """What transformers makes of the folders, in a process that cannot import this project."""
    outside = root / "outside"
    outside.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-I", "-c", OUTSIDE, str(root), ",".join(SHAPES), str(NUM_NEW)],
        cwd=outside,
        env=environment | {"HF_HOME": str(outside), "HF_HUB_OFFLINE": "1"},
        check=True,
    )
    return {name: torch.from_numpy(array) for name, array in np.load(root / "found.npz").items()}


@pytest.mark.parametrize("variant", SHAPES)
def test_transformers_gives_our_logits(variant: str, found: dict[str, torch.Tensor], root: Path) -> None:
    ids = torch.from_numpy(np.load(root / "ids.npy"))
    expected = float32_model(SHAPES[variant])(ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(found[f"{variant}.logits"], expected, rtol=0, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(found[f"{variant}.loss"], loss, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", SHAPES)
def test_generate_gives_the_tokens_of_our_engine(variant: str, found: dict[str, torch.Tensor], root: Path) -> None:
    greedy = found[f"{variant}.greedy"]

    async def ours() -> list[list[int]]:
        config = EngineConfig(device="cpu", dtype="float32", num_threads=1, kind="torch")
        engine = TorchEngine.from_exchange(root / variant, config)
        sampling = SamplingParams(max_tokens=NUM_NEW, temperature=0.0, stop_ids=(engine.info.eot_id,))
        rows = []
        for row in greedy[:, :NUM_PROMPT].tolist():
            outputs = await collect(engine, Request(id="r", prompt_ids=tuple(row), sampling=sampling))
            rows.append([o.token_id for o in outputs if isinstance(o, TokenOutput)])
        await engine.close()
        return rows

    for found_row, row in zip(greedy[:, NUM_PROMPT:].tolist(), asyncio.run(ours()), strict=True):
        assert found_row[: len(row)] == row
        assert not any(found_row[len(row) :])  # the other one of the batch went on
    assert torch.equal(found[f"{variant}.uncached"], greedy)
    assert torch.equal(found[f"{variant}.static"], greedy)
    num_new = found[f"{variant}.unpadded"].shape[1] - (NUM_PROMPT - 3)
    assert torch.equal(found[f"{variant}.padded"][:, 3:][:, : NUM_PROMPT - 3 + num_new], found[f"{variant}.unpadded"])


def test_two_byte_types_stay_near(found: dict[str, torch.Tensor]) -> None:
    exact = found["everything.logits"]
    difference = (found["bfloat16"] - exact).abs().max()
    assert 0 < difference < 0.2 * exact.std()


def test_transformers_reads_what_tensorrt_llm_asks_it_for(found: dict[str, torch.Tensor], root: Path) -> None:
    said = json.loads((root / "said.json").read_text())
    heads = SHAPES["bias"].num_heads
    assert said["is_fast"]
    assert said["sizes"] == {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": 32,
        "kraken_width": SHAPES["bias"].num_ways,
        "kraken_head_dim": SHAPES["bias"].head_size,
    }


def test_the_code_that_travels_stands_alone(root: Path) -> None:
    for module in {name.partition(".")[0] for name in CODE.values()}:
        text = (CODE_FOLDER / f"{module}.py").read_text()
        assert (root / "standard" / f"{module}.py").read_text() == text
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").partition(".")[0] in {"torch", "transformers", "typing"}
            elif isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= {"torch"}
    values = json.loads((root / "standard" / "config.json").read_text())
    assert values["auto_map"] == CODE


TRICKY = (
    "  leading\tand trailing  \n\n\n  x  =  1\r\n\r\n'll they've I'M can't\u00a0\u3000\u2028\u0085 naïve 漢字 ½²٣"
    " 🙂\U0001f469\u200d\U0001f467 e\u0301 \x00\x1f\ufeff a_b __init__ 12345678 ... !?!? \n \n\t \n   "
)


def fast(tokenizer: Tokenizer, folder: Path) -> tokenizers.Tokenizer:
    write_fast_tokenizer(folder, tokenizer, context_length=32)
    return tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_NAME))


def require_same(ours: Tokenizer, theirs: tokenizers.Tokenizer, texts: list[str]) -> None:
    for text, encoded in zip(texts, theirs.encode_batch(texts), strict=True):
        assert encoded.ids == ours.encode(text)
        assert theirs.decode(encoded.ids, skip_special_tokens=False) == text


def test_the_fast_tokenizer_gives_the_ids_of_tiktoken(
    tokenizer: Tokenizer, found: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    assert found["encoded"].tolist() == tokenizer.encode(TRICKY)
    theirs = fast(tokenizer, tmp_path)
    assert theirs.token_to_id("<|endoftext|>") == tokenizer.eot_id
    assert theirs.get_vocab_size() == tokenizer.num_ids
    state = random.Random(0)
    alphabet = [*TRICKY, *tiny.WORDS, " ", "  ", "\n"]
    texts = ["", TRICKY, *("".join(state.choices(alphabet, k=state.randrange(40))) for _ in range(2000))]
    require_same(tokenizer, theirs, texts)


def sampled(num_ids: int, every: int, folder: Path) -> None:
    documents = EmbeddedCorpus().documents[::every]
    tokenizer = Tokenizer.train((document.text for document in documents), num_ids)
    require_same(tokenizer, fast(tokenizer, folder), [document.text for document in documents])


def test_the_fast_tokenizer_on_a_sample_of_the_corpus(tmp_path: Path) -> None:
    sampled(1000, 40, tmp_path)


@pytest.mark.slow
def test_the_fast_tokenizer_on_the_whole_corpus(tmp_path: Path) -> None:
    sampled(4096, 1, tmp_path)


@pytest.mark.slow
def test_the_fast_tokenizer_with_as_many_ids_as_gpt2(tmp_path: Path) -> None:
    documents = [document.text for document in EmbeddedCorpus().documents]
    tokenizer = Tokenizer.train(documents, 30_000)
    require_same(tokenizer, fast(tokenizer, tmp_path), documents)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [(GPT2_PATTERN, GPT2_PATTERN.replace("$", r"\z")), (r"[$]\$$", r"[$]\$\z"), (r"\[$", r"\[\z")],
)
def test_the_end_of_a_line_is_not_the_end_of_a_text(pattern: str, expected: str) -> None:
    assert oniguruma(pattern) == expected
