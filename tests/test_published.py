"""Checkpoints of the published code: the same bits, the same logits, and nothing in a file is ever executed."""

import asyncio
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.loop import LoopKraken
from jobs.convert import main
from kraken.config import ConfigError, EngineConfig, ModelConfig, to_dict
from kraken.convert import CONFIG_NAME, WEIGHTS_NAME, read_exchange, to_exchange, write_folder
from kraken.engine.engine import TorchEngine
from kraken.engine.protocol import PromptOutput, Request, SamplingParams
from kraken.evaluate import collect
from kraken.manifest import MANIFEST_NAME, ArtefactError, Manifest, finish_artefact
from kraken.model import Kraken
from kraken.published import EMBEDDING, HEAD, UNKNOWN_LOSS, from_published, to_published
from kraken.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
NUM_IDS = 301


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer of 301 ids."""
    root = tmp_path_factory.mktemp("tokenizer")
    corpus = tiny.corpus(root / "corpus")
    Tokenizer.train((document.text for document in corpus.documents), NUM_IDS - 1).save(root)
    return str(root)


def shape(num_ways: int, **changes: Any) -> ModelConfig:
    heads = {"num_layers": 3, "width": 24, "num_heads": 12, "context_length": 32, "vocab_size": 320}
    return ModelConfig(num_ways=num_ways, **heads | changes)


def loop(config: ModelConfig) -> LoopKraken:
    """The published arithmetic with random weights, gains and biases, large enough that every one of them matters."""
    model = LoopKraken(config, composed=True).requires_grad_(False)
    for index, parameter in enumerate(model.parameters()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.2
        parameter.copy_(noise + (parameter.dim() == 1))
    return model


def checkpoint_of(model: LoopKraken, **changes: Any) -> dict[str, Any]:
    """What the published training writes, key for key."""
    c = model.config
    return {
        "model": model.state_dict(),
        "optimizer": {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3)}}, "param_groups": []},
        "model_args": {
            "n_layer": c.num_layers,
            "n_head": c.num_heads,
            "n_embd": c.width,
            "block_size": c.context_length,
            "bias": c.bias,
            "vocab_size": c.vocab_size,
            "dropout": 0.1,
            "n_heads_in_split": c.heads_per_way,
            "is_split": True,
            "ffn_expansion": c.ffn_multiple,
        },
        "iter_num": 7,
        "best_val_loss": torch.tensor(3.25),
        "config": {"learning_rate": 1e-3, "beta2": 0.9, "dataset": "openwebtext", "compile": True},
        **changes,
    }


def saved(checkpoint: Any, folder: Path) -> Path:
    path = folder / "ckpt.pt"
    torch.save(checkpoint, path)
    return path


def batch() -> Tensor:
    return torch.randint(NUM_IDS, (2, 32), generator=torch.Generator().manual_seed(0))


def exchange_of(model: Kraken, tokenizer: str, folder: Path) -> Path:
    """What the pipeline's convert stage leaves."""
    encoding = Tokenizer.load(Path(tokenizer))
    folder.mkdir()
    write_folder(folder, model.config, to_exchange(model), encoding)
    finish_artefact(
        folder,
        started_at=time.monotonic(),
        kind="convert",
        fingerprint="tiny",
        config={},
        parents={},
        metrics={},
        details={"tokenizer_fingerprint": encoding.fingerprint, "checkpoint": "step_000000020"},
    )
    return folder


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_ways", [2, 4, 6])
def test_logits_equal_the_published_arithmetic(num_ways: int, bias: bool, tokenizer: str, tmp_path: Path) -> None:
    model = loop(shape(num_ways, bias=bias))
    from_published(saved(checkpoint_of(model), tmp_path), tmp_path / "exchange", tokenizer)
    expected = model(batch())
    assert expected.std() > 0.5
    found = read_exchange(tmp_path / "exchange", torch.float32)(batch())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_engine_gives_the_published_log_probabilities(tokenizer: str, tmp_path: Path) -> None:
    model = loop(shape(4))
    from_published(saved(checkpoint_of(model), tmp_path), tmp_path / "exchange", tokenizer)
    prompt = batch()[0]

    async def score() -> list[float]:
        config = EngineConfig(device="cpu", dtype="float32", num_threads=1)
        engine = TorchEngine.from_exchange(tmp_path / "exchange", config)
        sampling = SamplingParams(max_tokens=0)
        request = Request(id="r", prompt_ids=tuple(prompt.tolist()), sampling=sampling, prompt_logprobs=True)
        (output,) = await collect(engine, request)
        await engine.close()
        assert isinstance(output, PromptOutput)
        return [entry.logprob for entry in output.logprobs if entry]

    logits = model(prompt[None, :-1])[0, :, :NUM_IDS]
    expected = logits.log_softmax(-1)[range(31), prompt[1:]]
    torch.testing.assert_close(torch.tensor(asyncio.run(score())), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_there_and_back_is_exact(dtype: torch.dtype, bias: bool, tokenizer: str, tmp_path: Path) -> None:
    original = checkpoint_of(loop(shape(2, bias=bias)).to(dtype))
    manifest = from_published(saved(original, tmp_path), tmp_path / "exchange", tokenizer)
    assert manifest == Manifest.read(tmp_path / "exchange")
    manifest.verify(tmp_path / "exchange")
    to_published(tmp_path / "exchange", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == original.keys()
    require_equal_tensors(back["model"], original["model"])
    assert back["model"][HEAD].data_ptr() == back["model"][EMBEDDING].data_ptr()
    for key in ("model_args", "iter_num", "config"):
        assert back[key] == original[key]
    assert back["best_val_loss"] == 3.25


def require_equal_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("bias", [False, True])
def test_a_folder_comes_back_from_a_published_file(bias: bool, tokenizer: str, tmp_path: Path) -> None:
    model = Kraken(shape(4, bias=bias))
    model.init_weights(seed=1)
    folder = exchange_of(model, tokenizer, tmp_path / "exchange")
    record = to_published(folder, tmp_path / "ckpt.pt")
    assert (record.iter_num, record.best_val_loss) == (20, None)
    from_published(tmp_path / "ckpt.pt", tmp_path / "again", str(folder))
    require_equal_tensors(load_file(tmp_path / "again" / WEIGHTS_NAME), load_file(folder / WEIGHTS_NAME))
    assert (tmp_path / "again" / CONFIG_NAME).read_text() == (folder / CONFIG_NAME).read_text()


def test_the_published_model_loads_what_is_written(tokenizer: str, tmp_path: Path) -> None:
    model = Kraken(shape(4, bias=True))
    model.init_weights(seed=1)
    to_published(exchange_of(model, tokenizer, tmp_path / "exchange"), tmp_path / "ckpt.pt")
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    oracle = LoopKraken(model.config)
    oracle.load_state_dict(checkpoint["model"])
    torch.testing.assert_close(oracle(batch()), model(batch()), rtol=0, atol=1e-5)
    matrices = [p for p in oracle.parameters() if p.dim() >= 2]
    vectors = [p for p in oracle.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors}])
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    oracle(batch()).sum().backward()
    optimizer.step()
    assert checkpoint["best_val_loss"] == UNKNOWN_LOSS


def test_an_unpadded_vocabulary_is_restored(tokenizer: str, tmp_path: Path) -> None:
    model = loop(shape(2))
    original = checkpoint_of(model)
    original["model_args"]["vocab_size"] = 310
    embedding = original["model"][EMBEDDING][:310].clone()
    original["model"] |= {EMBEDDING: embedding, HEAD: embedding}
    from_published(saved(original, tmp_path), tmp_path / "exchange", tokenizer)
    converted = read_exchange(tmp_path / "exchange", torch.float32)
    assert converted.config.vocab_size == 320 and not converted.wte.weight[310:].any()
    logits = converted(batch())
    torch.testing.assert_close(logits[..., :310], model(batch())[..., :310], rtol=0, atol=1e-5)
    to_published(tmp_path / "exchange", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    require_equal_tensors(back["model"], original["model"])
    assert back["model_args"]["vocab_size"] == 310


def test_compiled_writers_and_causal_masks_are_understood(tokenizer: str, tmp_path: Path) -> None:
    original = checkpoint_of(loop(shape(2, bias=True)))
    plain = original["model"]
    masks = {f"transformer.h.{w}.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for w in range(2) for i in range(3)}
    original["model"] = {f"_orig_mod.{name}": tensor for name, tensor in (plain | masks).items()}
    from_published(saved(original, tmp_path), tmp_path / "exchange", tokenizer)
    to_published(tmp_path / "exchange", tmp_path / "back.pt")
    require_equal_tensors(torch.load(tmp_path / "back.pt", weights_only=True)["model"], plain)


@pytest.mark.parametrize("writer", ["numpy 2", "numpy 1", "float64", "python", "absent"])
def test_the_best_loss_may_be_any_kind_of_number(writer: str, tokenizer: str, tmp_path: Path) -> None:
    """Training on several GPUs leaves a numpy number, which torch alone refuses to read."""
    value = {"numpy 2": np.float32(3.25), "numpy 1": np.float32(3.25), "float64": np.float64(3.25), "python": 3.25}
    path = saved(checkpoint_of(loop(shape(2)), best_val_loss=value.get(writer)), tmp_path)
    if writer == "numpy 1":
        replace_in_pickle(path, b"numpy._core.multiarray", b"numpy.core.multiarray")
    manifest = from_published(path, tmp_path / "exchange", tokenizer)
    assert manifest.details["published"]["best_val_loss"] == (None if writer == "absent" else 3.25)


def replace_in_pickle(path: Path, old: bytes, new: bytes) -> None:
    """Change the pickle inside a file of torch.save; everything else stays."""
    with zipfile.ZipFile(path) as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            if name.endswith("data.pkl"):
                assert old in content
                content = content.replace(old, new)
            archive.writestr(name, content)


class Harmful:
    """Makes a folder when a pickle that holds it is read the ordinary way."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_nothing_in_a_file_is_executed(tokenizer: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(loop(shape(2)), config=Harmful(tmp_path / "harm"))
    with pytest.raises(ArtefactError, match=r"objects that only code can read \(posix.mkdir\); such files are refused"):
        from_published(saved(checkpoint, tmp_path), tmp_path / "exchange", tokenizer)
    assert not (tmp_path / "harm").exists() and not (tmp_path / "exchange").exists()


def broken(key: str, **changes: Any) -> Callable[[dict[str, Any]], Any]:
    """Change entries of one part of a checkpoint; None takes an entry away."""

    def change(checkpoint: dict[str, Any]) -> dict[str, Any]:
        part = {**checkpoint[key], **changes}
        return {**checkpoint, key: {name: value for name, value in part.items() if value is not None}}

    return change


def renamed(checkpoint: dict[str, Any]) -> dict[str, Any]:
    names = {name: name.replace("mlp.c_fc", "mlp.up") for name in checkpoint["model"]}
    return {**checkpoint, "model": {names[name]: tensor for name, tensor in checkpoint["model"].items()}}


LINEAR = "transformer.h.1.2.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: [c], "holds a list, not a checkpoint of the published code"),
        (
            lambda c: c["model"],
            "lacks the dict 'model' of a checkpoint of the published code; it has ['lm_head",
        ),
        (lambda c: {"model": c["model"]}, "lacks the dict 'model_args'"),
        (broken("model_args", n_head=None, is_split=None), "missing ['n_head', 'is_split'], unexpected []"),
        (broken("model_args", rope=True), "missing [], unexpected ['rope']"),
        (broken("model_args", n_layer="3"), "model_args['n_layer']='3'"),
        (broken("model_args", n_embd=True), "model_args['n_embd']=True"),
        (broken("model_args", n_heads_in_split=0), "model_args['n_heads_in_split']=0"),
        (broken("model_args", n_heads_in_split=5), "n_head=12 in"),
        (broken("model_args", n_embd=25), "model.width=25 is not divisible by the 6 heads of a way"),
        (broken("model_args", is_split=False), "is a standard GPT-2, which the published code could not build"),
        (broken("model_args", n_layer=4), "missing ['transformer.h.0.3.attn.c_attn.weight', 'transformer.h.0.3.attn."),
        (broken("model_args", bias=True), "missing ['transformer.conjunction.bias', "),
        (broken("model_args", ffn_expansion=4), "transformer.h.0.0.mlp.c_fc.weight in"),
        (broken("model_args", vocab_size=319), "transformer.wte.weight in"),
        (broken("model", **{HEAD: None}), "missing ['lm_head.weight'], unexpected []"),
        (broken("model", **{HEAD: torch.zeros(320, 24)}), "lm_head.weight differs from transformer.wte.weight"),
        (broken("model", **{HEAD: torch.zeros(320, 24).half()}), "lm_head.weight differs from transformer.wte.weight"),
        (broken("model", extra=torch.zeros(1)), "missing [], unexpected ['extra']"),
        (broken("model", **{LINEAR: torch.zeros(48, 23)}), f"{LINEAR} in"),
        (broken("model", **{LINEAR: torch.zeros(48, 24, dtype=torch.int8)}), "is a torch.int8, not a dense tensor"),
        (broken("model", **{LINEAR: [1.0]}), "is a list, not a dense tensor"),
        (renamed, "unexpected ['transformer.h.0.0.mlp.up.weight', 'transformer.h.0.1.mlp.up.weight', "),
        (lambda c: {**c, "iter_num": "7"}, "iter_num='7' in"),
        (lambda c: {**c, "best_val_loss": torch.zeros(2)}, "best_val_loss=tensor([0., 0.]) in"),
        (lambda c: {**c, "best_val_loss": np.str_("low")}, "cannot be read"),
    ],
)
def test_another_kind_of_file_is_refused_in_one_line(
    change: Callable[[dict[str, Any]], Any], message: str, tokenizer: str, tmp_path: Path
) -> None:
    path = saved(change(checkpoint_of(loop(shape(2)))), tmp_path)
    with pytest.raises(ArtefactError, match=re.escape(message)) as caught:
        from_published(path, tmp_path / "exchange", tokenizer)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["ckpt.pt"]


def test_a_damaged_file_is_refused(tokenizer: str, tmp_path: Path) -> None:
    path = saved(checkpoint_of(loop(shape(2))), tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtefactError, match="is truncated; copy it again"):
        from_published(path, tmp_path / "exchange", tokenizer)
    path.write_bytes(b"no torch file")
    with pytest.raises(ArtefactError, match="is no file of torch 1.6 or newer"):
        from_published(path, tmp_path / "exchange", tokenizer)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02garbage")
    with pytest.raises(ArtefactError, match="cannot be read"):
        from_published(path, tmp_path / "exchange", tokenizer)


def test_the_users_mistakes(tokenizer: str, tmp_path: Path) -> None:
    path = saved(checkpoint_of(loop(shape(2, vocab_size=256))), tmp_path)
    with pytest.raises(ConfigError, match="nosuch.pt is no file"):
        from_published(tmp_path / "nosuch.pt", tmp_path / "exchange", tokenizer)
    with pytest.raises(ConfigError, match="exists and is not empty"):
        from_published(path, tmp_path, tokenizer)
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        from_published(path, path, tokenizer)
    with pytest.raises(ConfigError, match="neither gpt2 nor a folder"):
        from_published(path, tmp_path / "exchange", "gpt3")
    with pytest.raises(ArtefactError, match="holds no tokenizer"):
        from_published(path, tmp_path / "exchange", str(tmp_path))
    with pytest.raises(ConfigError, match="has 301 ids, the model in .* only vocab_size=256"):
        from_published(path, tmp_path / "exchange", tokenizer)
    with pytest.raises(ConfigError, match="ckpt.pt exists; name another file"):
        to_published(tmp_path, path)
    with pytest.raises(ConfigError, match="is no folder"):
        to_published(tmp_path / "nosuch", tmp_path / "new.pt")
    with pytest.raises(ArtefactError, match=f"holds no {MANIFEST_NAME}"):
        to_published(tmp_path, tmp_path / "new.pt")


def test_gpt2s_ranks_out_of_reach_name_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable() -> Tokenizer:
        raise ArtefactError("no network") from ConnectionError()

    monkeypatch.setattr(Tokenizer, "gpt2", unreachable)
    path = saved(checkpoint_of(loop(shape(2))), tmp_path)
    with pytest.raises(ArtefactError, match=r"could not be had \(ConnectionError\); .* or give --tokenizer FOLDER"):
        from_published(path, tmp_path / "exchange", "gpt2")


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "standard", "num_ways": 1},
        {"architecture": "parallel", "num_ways": 1},
        {"positions": "rope"},
        {"activation": "swiglu"},
        {"num_ways": 1},
    ],
)
def test_what_the_published_code_lacks_is_not_written(changes: dict[str, Any], tokenizer: str, tmp_path: Path) -> None:
    model = Kraken(ModelConfig(**to_dict(shape(2)) | changes))
    model.init_weights(seed=1)
    folder = exchange_of(model, tokenizer, tmp_path / "exchange")
    (field, value), *_ = changes.items()
    with pytest.raises(ConfigError, match=f"model.{field}={value}"):
        to_published(folder, tmp_path / "ckpt.pt")
    assert [entry.name for entry in tmp_path.iterdir()] == ["exchange"]


class TestCommandLine:
    def test_both_directions(self, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        original = checkpoint_of(loop(shape(2)))
        path, folder, back = saved(original, tmp_path), tmp_path / "new" / "exchange", tmp_path / "newer" / "back.pt"
        main(["--from-published", str(path), "--out", str(folder), f"--tokenizer={tokenizer}"])
        main(["--out", str(back), f"--to-published={folder}"])
        require_equal_tensors(torch.load(back, weights_only=True)["model"], original["model"])
        printed = capsys.readouterr().out
        assert "iter_num 7" in printed and "best_val_loss 3.25" in printed and "optimizer starts afresh" in printed

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--from-published", "a"], "arguments are required: --out"),
            (["--from-published", "a", "--to-published", "b", "--out", "c"], "not allowed with argument"),
            (["quickstart", "--from-published", "a", "--out", "c"], "unrecognized arguments: quickstart"),
            (["--to-published", "a", "--out", "c", "--tokenizer", "gpt2"], "--tokenizer has no effect"),
            (["--from-published", "s3://bucket/ckpt.pt", "--out", "c"], "s3://bucket/ckpt.pt is a URI"),
            (["--from-published", "/nosuch.pt", "--out", "c"], "/nosuch.pt is no file"),
            (["--out", "c"], "the preset comes first"),
        ],
    )
    def test_mistakes_are_one_line(self, argv: list[str], message: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(message)) as caught:
            main(argv)
        assert "\n" not in str(caught.value)

    def test_a_submitted_job_needs_absolute_paths(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
        with pytest.raises(ConfigError, match="--out=c is relative"):
            main(["--from-published", "/a", "--out", "c"])

    def test_help_names_every_use_and_loads_no_torch(self) -> None:
        code = (
            "import sys, contextlib; from jobs.convert import main; main(['--from-published', '-h'])\n"
            "with contextlib.suppress(SystemExit): main(['-h'])\n"
            "print('torch' in sys.modules)"
        )
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        for text in ("PRESET", "--from-published ckpt.pt --out FOLDER", "--to-published FOLDER --out ckpt.pt"):
            assert text in result.stdout
        assert result.stdout.splitlines()[-1] == "False"

    def test_exit_status_of_a_damaged_file(self, tmp_path: Path) -> None:
        (tmp_path / "ckpt.pt").write_bytes(b"PK\x03\x04")
        command = [sys.executable, "-m", "jobs.convert", "--from-published", "ckpt.pt", "--out", "exchange"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 1
        assert result.stderr == f"error: {tmp_path / 'ckpt.pt'} is truncated; copy it again\n"
