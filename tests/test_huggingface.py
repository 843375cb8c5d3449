"""Hugging Face: a folder alone gives transformers the same logits and the same tokens as our own model and engine."""

import ast
import asyncio
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tokenizers
import torch
from test_convert import float32_model
from test_model import VARIANTS

from jobs.convert import main as convert_main
from kraken.config import ConfigError, EngineConfig
from kraken.convert import (
    CODE,
    CODE_FOLDER,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    WEIGHTS_NAME,
    to_exchange,
    write_folder,
)
from kraken.data.embedded import EmbeddedCorpus
from kraken.engine.engine import TorchEngine
from kraken.engine.protocol import Request, SamplingParams, TokenOutput
from kraken.evaluate import collect
from kraken.huggingface.tokenizer import TOKENIZER_CONFIG_NAME, TOKENIZER_NAME, oniguruma, write_fast_tokenizer
from kraken.manifest import ArtefactError, finish_artefact
from kraken.saved import from_saved
from kraken.tokenizer import END_OF_TEXT, GPT2_PATTERN, RANKS_NAME, Tokenizer
from kraken.trtllm.checkpoint import from_exchange
from serve.protocol import TokenizerInfo

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
sys.path[:0] = sys.argv[4:]  # another version of transformers
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig, pipeline

torch.set_num_threads(1)
root, names, num_new = sys.argv[1], sys.argv[2].split(","), int(sys.argv[3])
num_ids = 301
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
    greedy = {"max_new_tokens": num_new, "do_sample": False, "disable_compile": True}
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
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["if", "while value in buffer", "return index else"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"} and batch.attention_mask[0, 0] == 0
    together = model.generate(**batch, **greedy)[:, batch.input_ids.shape[1] :]
    for text, row in zip(texts, together, strict=True):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), **greedy)[0]
        num_prompt = len(tokenizer(text).input_ids)
        assert torch.equal(alone[num_prompt:], row[: len(alone) - num_prompt]), (name, text)
        assert (row[len(alone) - num_prompt :] == tokenizer.pad_token_id).all()
    with torch.inference_mode():  # of all positions, not of the last alone
        whole = model(**batch).logits
        for row, logits in zip(batch.input_ids, whole, strict=True):
            single = row[row != tokenizer.pad_token_id]
            assert (logits[-len(single) :, :num_ids] - model(single[None]).logits[0, :, :num_ids]).abs().max() < 1e-5
    if name == "everything":
        answers = pipeline("text-generation", model=model, tokenizer=tokenizer)(texts, batch_size=3, **greedy)
        assert [answer[0]["generated_text"].startswith(text) for answer, text in zip(answers, texts)] == [True] * 3
        beams = model.generate(**batch, **(greedy | {"num_beams": 3}))
        drawn = model.generate(
            **batch, do_sample=True, max_new_tokens=num_new, top_k=0, temperature=100.0, suppress_tokens=None
        )
        assert max(beams.max(), drawn.max()) < num_ids
        with torch.inference_mode():  # both names of the cache, where transformers knows one of them
            for key in ("past_key_values", "cache"):
                cache = DynamicCache()
                model(ids[:, :3], **{key: cache})
                continued = model(ids[:, 3:], **{key: cache}).logits[..., :num_ids]
                assert (continued - found[f"{name}.logits"][:, 3:, :num_ids]).abs().max() < 1e-5
        for special in ("eos", "bos", "pad"):
            ids_of = (model.config, GenerationConfig.from_pretrained(folder), tokenizer)
            assert {getattr(holder, f"{special}_token_id") for holder in ids_of} == {num_ids - 1}
        tokenizer.save_pretrained(f"{root}/again")
        model.save_pretrained(f"{root}/again")
        again = AutoModelForCausalLM.from_pretrained(f"{root}/again", trust_remote_code=True)
        assert torch.equal(again(ids).logits, model(ids).logits)
        with torch.inference_mode():
            found["bfloat16"] = model.bfloat16()(ids).logits.float()
config = AutoConfig.from_pretrained(f"{root}/tensorrt_llm", trust_remote_code=True)
assert config.dtype == torch.bfloat16 and config.architectures == ["KrakenForCausalLM"]
names_of_sizes = ("num_attention_heads", "num_key_value_heads", "head_dim", "num_ways")
sizes = {name: getattr(config, name) for name in names_of_sizes}
tokenizer = AutoTokenizer.from_pretrained(f"{root}/{names[0]}", trust_remote_code=True)
text = open(f"{root}/text", newline="").read()
encoded = tokenizer(text).input_ids
assert tokenizer.decode(encoded) == text
assert tokenizer("a<|endoftext|>").input_ids[-1] == tokenizer.eos_token_id == tokenizer.bos_token_id
found["encoded"] = torch.tensor(encoded)
np.savez(f"{root}/found.npz", **{name: tensor.numpy() for name, tensor in found.items()})
said = {"is_fast": tokenizer.is_fast, "sizes": sizes, "version": transformers.__version__}
json.dump(said, open(f"{root}/said.json", "w"))
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


def run_outside(root: Path, names: Iterable[str], *paths: Path) -> dict[str, torch.Tensor]:
    """What transformers makes of the folders, in a process that cannot import this project.

    Args:
        paths: folders of packages that come before the environment's own.
    """
    outside = root / "outside"
    shutil.rmtree(outside, ignore_errors=True)
    outside.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-I", "-c", OUTSIDE, str(root), ",".join(names), str(NUM_NEW), *map(str, paths)],
        cwd=outside,
        env=environment | {"HF_HOME": str(outside), "HF_HUB_OFFLINE": "1"},
        check=True,
    )
    return {name: torch.from_numpy(array) for name, array in np.load(root / "found.npz").items()}


@pytest.fixture(scope="module")
def found(root: Path) -> dict[str, torch.Tensor]:
    """By the environment's own transformers, of every variant."""
    return run_outside(root, SHAPES)


@pytest.mark.parametrize("variant", SHAPES)
def test_transformers_gives_our_logits(variant: str, found: dict[str, torch.Tensor], root: Path) -> None:
    ids = torch.from_numpy(np.load(root / "ids.npy"))
    expected = float32_model(SHAPES[variant])(ids)[..., :NUM_IDS]
    assert expected.std() > 0.1
    torch.testing.assert_close(found[f"{variant}.logits"][..., :NUM_IDS], expected, rtol=0, atol=1e-5)
    assert (found[f"{variant}.logits"][..., NUM_IDS:] == -torch.inf).all()
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
        assert set(found_row[len(row) :]) <= {NUM_IDS - 1}  # padding: the other one of the batch went on
    assert torch.equal(found[f"{variant}.uncached"], greedy)
    assert torch.equal(found[f"{variant}.static"], greedy)
    num_new = found[f"{variant}.unpadded"].shape[1] - (NUM_PROMPT - 3)
    assert torch.equal(found[f"{variant}.padded"][:, 3:][:, : NUM_PROMPT - 3 + num_new], found[f"{variant}.unpadded"])


def test_what_transformers_saved_comes_back(found: dict[str, torch.Tensor], root: Path, tmp_path: Path) -> None:
    """Its folder has neither our tokenizer's ranks nor a manifest; both are made anew."""
    saved = root / "again"
    assert not (saved / RANKS_NAME).exists()
    with pytest.raises(ArtefactError, match="jobs.convert --from-huggingface"):
        TorchEngine.from_exchange(saved, EngineConfig(device="cpu"))
    (saved / "chat_template.jinja").write_text("{{ messages }}")
    convert_main(["--from-huggingface", str(saved), "--out", str(tmp_path / "back")])
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == "{{ messages }}"
    for name in (RANKS_NAME, CONFIG_NAME, GENERATION_CONFIG_NAME, TOKENIZER_CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "back" / name).read_bytes() == (root / "everything" / name).read_bytes(), name
    info = TorchEngine.from_exchange(tmp_path / "back", EngineConfig(device="cpu", dtype="float32")).info
    assert (info.num_ids, info.eot_id) == (NUM_IDS, NUM_IDS - 1)


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _truncated(folder: Path) -> None:
    content = (folder / WEIGHTS_NAME).read_bytes()
    (folder / WEIGHTS_NAME).write_bytes(content[: len(content) // 2])


def _with(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (_without(CONFIG_NAME), ArtefactError, "config.json is missing"),
        (_without(WEIGHTS_NAME), ArtefactError, "model.save_pretrained"),
        (_without(TOKENIZER_NAME), ConfigError, "tokenizer.save_pretrained"),
        (_truncated, ArtefactError, "save the model again"),
        (_with(CONFIG_NAME, num_token_ids=300), ArtefactError, "num_token_ids=300 .* has 301 ids"),
        (_with(CONFIG_NAME, layer_norm_eps=1e-6), ArtefactError, "layer_norm_eps=1e-06"),
        (_with(TOKENIZER_NAME, normalizer={"type": "NFC"}), ArtefactError, "in \\['normalizer'\\]"),
        (_with(TOKENIZER_NAME, pre_tokenizer=None), ArtefactError, "cannot be read as a tokenizer"),
    ],
)
def test_what_cannot_come_back_says_why(
    damage: Callable[[Path], None],
    error: type[Exception],
    said: str,
    found: dict[str, torch.Tensor],
    root: Path,
    tmp_path: Path,
) -> None:
    source = tmp_path / "saved"
    shutil.copytree(root / "again", source)
    damage(source)
    with pytest.raises(error, match=said):
        from_saved(source, tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_every_interface_names_the_same_special_tokens(tokenizer: Tokenizer, root: Path) -> None:
    """The model's files, the tokenizer's and the endpoint; the process outside compares what transformers reads."""
    folder = root / "standard"
    for name in (CONFIG_NAME, GENERATION_CONFIG_NAME):
        values = json.loads((folder / name).read_text())
        assert {values[f"{special}_token_id"] for special in ("bos", "eos", "pad")} == {tokenizer.eot_id}
    told = TokenizerInfo(name="any", num_ids=tokenizer.num_ids, fingerprint="any").model_dump()
    values = json.loads((folder / TOKENIZER_CONFIG_NAME).read_text())
    for special in ("bos", "eos", "pad", "unk"):
        assert values.get(f"{special}_token") == told.get(f"{special}_token"), special
    assert values["pad_token"] == END_OF_TEXT and values["padding_side"] == "left"
    engine = TorchEngine.from_exchange(folder, EngineConfig(device="cpu", dtype="float32"))
    assert (engine.info.eot_id, engine.info.num_ids) == (tokenizer.eot_id, tokenizer.num_ids)
    assert values["model_max_length"] == engine.info.context_length


@pytest.mark.slow
@pytest.mark.parametrize("requirement", ["transformers==4.57.6", "transformers==5.23.0", "transformers"])
def test_other_versions_of_transformers(requirement: str, root: Path, tmp_path: Path) -> None:
    """The oldest that is supported, the last whose cache is called `past_key_values`, and the newest that there is."""
    target = tmp_path / "packages"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(target), requirement]
    subprocess.run(command, check=True)
    names = ("standard", "everything")
    found = run_outside(root, names, target)
    version = json.loads((root / "said.json").read_text())["version"]
    assert version.startswith(requirement.partition("==")[2])
    assert (target / f"transformers-{version}.dist-info").is_dir()
    for name in names:
        test_transformers_gives_our_logits(name, found, root)
        test_generate_gives_the_tokens_of_our_engine(name, found, root)
    test_what_transformers_saved_comes_back(found, root, tmp_path)


def test_two_byte_types_stay_near(found: dict[str, torch.Tensor]) -> None:
    exact = found["everything.logits"][..., :NUM_IDS]
    difference = (found["bfloat16"][..., :NUM_IDS] - exact).abs().max()
    assert 0 < difference < 0.2 * exact.std()


def test_transformers_reads_what_tensorrt_llm_asks_it_for(found: dict[str, torch.Tensor], root: Path) -> None:
    said = json.loads((root / "said.json").read_text())
    heads = SHAPES["bias"].num_heads
    assert said["is_fast"]
    assert said["sizes"] == {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": 32,
        "num_ways": SHAPES["bias"].num_ways,
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
