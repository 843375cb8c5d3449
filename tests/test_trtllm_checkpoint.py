"""Exchange folder -> TensorRT-LLM folder: the same logits, the promised names and shapes, in bounded memory."""

import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_convert import float32_model

from jobs.convert import main
from kraken.config import ConfigError, ConvertConfig, ModelConfig
from kraken.convert import exchange_shapes, read_exchange, to_exchange, write_folder
from kraken.engine.placement import TENSORRT_LLM_FOLDER
from kraken.manifest import ArtefactError, Manifest, Metric, finish_artefact
from kraken.model import Kraken
from kraken.presets import PRESETS
from kraken.storage import Storage
from kraken.tokenizer import Tokenizer
from kraken.trtllm.checkpoint import from_exchange, plan_shards
from kraken.trtllm.parts import padded_head_size, padded_tensors, padded_vocab_size, plan_parts
from kraken.trtllm.proof import padded_logits, proof_metrics, proof_shape, prove_padding, require_proven
from pipelines import convert
from pipelines.end_to_end import STAGES
from pipelines.stage import Work, fingerprints

ROOT = Path(__file__).parent.parent
PUBLISHED = [
    f"kraken_{size}" for size in ("125m_2way", "125m_4way", "125m_6way", "350m_2way", "350m_4way", "760m_4way")
]
GB = 10**9


def shape(num_ways: int, **changes: Any) -> ModelConfig:
    """Heads of 6 channels, which no kernel has."""
    sizes = {"num_layers": 3, "width": 18, "num_heads": 3 * num_ways, "context_length": 16, "vocab_size": 320}
    return ModelConfig(num_ways=num_ways, **(sizes | changes))


SHAPES = {
    "2way": shape(2),
    "4way": shape(4),
    "6way": shape(6),
    "bias": shape(2, bias=True),
    "swiglu": shape(2, activation="swiglu", bias=True),
    "standard": shape(1, architecture="standard"),
    "parallel": shape(1, architecture="parallel", bias=True),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    corpus = tiny.corpus(tmp_path_factory.mktemp("corpus"))
    return Tokenizer.train((document.text for document in corpus.documents), 300)


def exchange(folder: Path, model: Kraken, tokenizer: Tokenizer) -> Path:
    folder.mkdir()
    write_folder(folder, model.config, to_exchange(model), tokenizer)
    finish_artefact(
        folder,
        started_at=time.monotonic(),
        kind="convert",
        fingerprint="f" * 64,
        config={},
        parents={},
        metrics={},
        details={"tokenizer_fingerprint": tokenizer.fingerprint},
    )
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for path in sorted(folder.glob("*.safetensors")) for name, x in load_file(path).items()}


class TestTensors:
    @pytest.mark.parametrize("name", SHAPES)
    def test_names_and_shapes_are_those_of_the_contract(self, name: str) -> None:
        c = SHAPES[name]
        D, inner, hidden = c.width, c.heads_per_way * 32, c.ffn_size * (2 if c.activation == "swiglu" else 1)
        linears = {f"attn.{letter}": (inner, D) for letter in "qkv"}
        linears |= {"attn.o": (D, inner), "mlp.fc": (hidden, D), "mlp.proj": (D, c.ffn_size)}
        modules = linears | ({"ln_1": (D,)} if c.architecture == "parallel" else {"ln_1": (D,), "ln_2": (D,)})
        expected: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (padded_vocab_size(c), D)}
        expected |= {"embed_positions.weight": (c.context_length, D), "ln_f.weight": (D,)}
        if c.architecture == "kraken":
            expected["conjunction.weight"] = (D, c.num_ways * D)
        for way in range(c.num_ways):
            for layer in range(c.num_layers):
                expected |= {f"ways.{way}.layers.{layer}.{m}.weight": size for m, size in modules.items()}
        if c.bias:
            biased = [n for n in expected if not n.startswith("embed")]
            expected |= {n.replace("weight", "bias"): expected[n][:1] for n in biased}
        assert {part.name: part.shape for part in plan_parts(c)} == expected

    @pytest.mark.parametrize("name", SHAPES)
    def test_padding_holds_nothing_and_the_rest_is_what_it_was(self, name: str) -> None:
        c = SHAPES[name]
        model = float32_model(c)
        original = to_exchange(model)
        padded = padded_tensors(c, original, torch.float32)
        H, P, N = c.head_size, padded_head_size(c), c.heads_per_way
        assert (H, P) == (6, 32)
        for way in range(c.num_ways):
            for layer in range(c.num_layers):
                old, new = f"transformer.h.{way}.{layer}.attn", f"ways.{way}.layers.{layer}.attn"
                for kind in ("weight", "bias") if c.bias else ("weight",):
                    for letter, part in zip("qkv", original[f"{old}.c_attn.{kind}"].chunk(3), strict=True):
                        heads = padded[f"{new}.{letter}.{kind}"].unflatten(0, (N, P))
                        factor = math.sqrt(P / H) if letter == "q" else 1.0
                        torch.testing.assert_close(heads[:, :H].flatten(0, 1), part * factor, rtol=1e-6, atol=0)
                        assert not heads[:, H:].any()
                columns = padded[f"{new}.o.weight"].unflatten(1, (N, P))
                assert torch.equal(columns[..., :H].flatten(1), original[f"{old}.c_proj.weight"])
                assert not columns[..., H:].any()
        tokens = padded["embed_tokens.weight"]
        assert torch.equal(tokens[: c.vocab_size], original["transformer.wte.weight"])
        assert not tokens[c.vocab_size :].any()

    def test_queries_are_scaled_before_they_are_rounded(self) -> None:
        c = shape(2)
        original = to_exchange(float32_model(c))
        exact = padded_tensors(c, original, torch.float32)
        rounded = padded_tensors(c, original, torch.bfloat16)
        for name, tensor in exact.items():
            assert torch.equal(rounded[name], tensor.bfloat16()), name

    def test_the_vocabulary_divides_evenly(self) -> None:
        assert padded_vocab_size(shape(6)) == 384  # a multiple of 64 and of 6
        assert padded_vocab_size(shape(4)) == 320
        for name in PUBLISHED:
            assert padded_vocab_size(PRESETS[name]().model) == 50_304

    def test_head_sizes_of_the_published_presets(self) -> None:
        models = [PRESETS[name]().model for name in PUBLISHED]
        assert {c.head_size: padded_head_size(c) for c in models} == {
            **dict.fromkeys((111, 113), 128),
            **dict.fromkeys((161, 168, 209, 240), 256),
        }


class TestProof:
    @pytest.mark.parametrize("name", PUBLISHED + [f"{name}_aligned" for name in PUBLISHED])
    def test_padding_changes_no_logit(self, name: str) -> None:
        c = PRESETS[name]().model
        small = proof_shape(c)
        assert (small.num_ways, small.width, small.heads_per_way) == (c.num_ways, c.width, c.heads_per_way)
        proof = prove_padding(small)
        assert proof.passed and proof.max_abs_diff <= 1e-5
        assert proof.num_tokens == 32

    @pytest.mark.slow
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_at_full_depth_too(self, name: str) -> None:
        c = PRESETS[name]().model
        assert prove_padding(dataclasses.replace(proof_shape(c), num_layers=c.num_layers)).passed

    @pytest.mark.parametrize("name", SHAPES)
    def test_every_option(self, name: str) -> None:
        assert prove_padding(SHAPES[name]).passed

    @pytest.mark.parametrize("wrong", ["attn.q.weight", "attn.k.weight", "attn.o.weight", "mlp.fc.bias", "ln_2.bias"])
    def test_a_wrong_tensor_would_be_seen(self, wrong: str) -> None:
        c = shape(2, bias=True)
        model = float32_model(c)
        tensors = padded_tensors(c, to_exchange(model), torch.float32)
        ids = torch.arange(16)[None]
        torch.testing.assert_close(padded_logits(tensors, c, ids), model(ids), rtol=0, atol=1e-5)
        tensors[f"ways.1.layers.1.{wrong}"] *= 0.9
        assert (padded_logits(tensors, c, ids) - model(ids)).abs().max() > 1e-4

    def test_a_large_model_is_proven_on_two_of_its_ways(self) -> None:
        c = proof_shape(SIXTY_FIVE)
        assert (c.num_ways, c.heads_per_way, c.width) == (2, SIXTY_FIVE.heads_per_way, SIXTY_FIVE.width)

    def test_a_failed_proof_is_refused(self, tmp_path: Path) -> None:
        proof = dataclasses.replace(prove_padding(shape(2)), max_abs_diff=1e-3)
        common: dict[str, Any] = {"kind": "convert", "fingerprint": "", "config": {}, "parents": {}}
        with pytest.raises(ArtefactError, match="padded heads change the logits by 1.00e-03"):
            require_proven(Manifest(metrics=proof_metrics(proof), **common))
        require_proven(Manifest(metrics=proof_metrics(prove_padding(shape(2))), **common))
        require_proven(Manifest(metrics={"parameters": Metric(1, "parameters")}, **common))


class TestFolder:
    @pytest.mark.parametrize("name", SHAPES)
    def test_a_folder_gives_the_logits_of_the_exchange_folder(
        self, name: str, tokenizer: Tokenizer, tmp_path: Path
    ) -> None:
        c = SHAPES[name]
        source = exchange(tmp_path / "exchange", float32_model(c), tokenizer)
        manifest = from_exchange(source, tmp_path / "out", dtype=torch.float32)
        assert manifest == Manifest.read(tmp_path / "out")
        manifest.verify(tmp_path / "out")
        assert (manifest.kind, manifest.parents) == ("trtllm", {"convert": "f" * 64})
        assert manifest.value("padding_proven") == 1.0
        ids = torch.randint(301, (2, 16), generator=torch.Generator().manual_seed(0))
        found = padded_logits(tensors_of(tmp_path / "out"), c, ids)[..., : c.vocab_size]
        torch.testing.assert_close(found, read_exchange(source, torch.float32)(ids), rtol=0, atol=1e-5)
        assert Tokenizer.load(tmp_path / "out").fingerprint == tokenizer.fingerprint
        assert not list(tmp_path.glob(".*"))

    def test_the_config_counts_all_ranks_and_padded_heads(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        source = exchange(tmp_path / "exchange", float32_model(shape(6, bias=True)), tokenizer)
        from_exchange(source, tmp_path / "out")
        values = json.loads((tmp_path / "out" / "config.json").read_text())
        expected = {
            "architectures": ["KrakenForCausalLM"],
            "model_type": "kraken",
            "auto_map": {"AutoConfig": "configuration_kraken.KrakenConfig"},
            "hidden_size": 18,
            "num_hidden_layers": 3,
            "num_attention_heads": 18,
            "num_key_value_heads": 18,
            "head_dim": 32,
            "intermediate_size": 36,
            "max_position_embeddings": 16,
            "vocab_size": 384,
            "num_token_ids": 301,
            "torch_dtype": "bfloat16",
            "tie_word_embeddings": True,
            "layer_norm_eps": 1e-5,
            "num_ways": 6,
            "bias": True,
        }
        assert {name: values[name] for name in expected} == expected
        assert (tmp_path / "out" / "configuration_kraken.py").is_file()
        assert not (tmp_path / "out" / "modeling_kraken.py").exists()  # it reads other names

    def test_files_stay_below_the_limit(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        source = exchange(tmp_path / "exchange", float32_model(shape(4)), tokenizer)
        from_exchange(source, tmp_path / "whole", dtype=torch.float32)
        from_exchange(source, tmp_path / "parts", dtype=torch.float32, max_shard_bytes=60_000)
        index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
        files = sorted(set(index["weight_map"].values()))
        assert len(files) > 3
        for file in files:
            with safe_open(tmp_path / "parts" / file, framework="pt") as opened:
                assert {name for name, where in index["weight_map"].items() if where == file} == set(opened.keys())
            assert sum(x.nbytes for x in load_file(tmp_path / "parts" / file).values()) <= 60_000
        whole, parts = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "parts")
        assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())

    def test_a_failure_leaves_nothing(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        source = exchange(tmp_path / "exchange", float32_model(shape(2)), tokenizer)
        weights = source / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-4])
        with pytest.raises(ArtefactError, match="cannot be read"):
            from_exchange(source, tmp_path / "out", exchange_fingerprint="f" * 64)
        assert [path.name for path in tmp_path.iterdir()] == ["exchange"]

    def test_what_cannot_be_converted_is_refused(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"model.positions=rope.*engine.kind=torch"):
            plan_parts(shape(2, positions="rope"))
        with pytest.raises(ConfigError, match=r"model.architecture=kraken_delayed.*engine.kind=torch"):
            plan_parts(shape(2, architecture="kraken_delayed"))
        with pytest.raises(ConfigError, match="head size is 300.*no kernel above 256"):
            plan_parts(shape(2, width=900))
        source = exchange(tmp_path / "exchange", float32_model(shape(2)), tokenizer)
        with pytest.raises(ConfigError, match="not empty"):
            from_exchange(source, source)

    def test_the_command_line(self, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source = exchange(tmp_path / "exchange", float32_model(shape(2)), tokenizer)
        main(["--to-tensorrt-llm", str(source), "--out", str(tmp_path / "out")])
        assert "heads of 6 channels became 32" in capsys.readouterr().out
        assert Manifest.read(tmp_path / "out").config["dtype"] == "bfloat16"
        with pytest.raises(ConfigError, match="is no folder"):
            main(["--to-tensorrt-llm", str(tmp_path / "none"), "--out", str(tmp_path / "other")])


SIXTY_FIVE = ModelConfig(
    num_layers=80, width=3584, num_heads=256, num_ways=8, context_length=2048, vocab_size=50304, ffn_multiple=2
)
"""About 65 B parameters; heads of 112 channels."""

MEASURE = """
import sys
from pathlib import Path
import torch
from kraken.convert import read_model_config
from kraken.trtllm.checkpoint import write_weights

def kilobytes(key):
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(key)))

exchange, folder, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
config, _ = read_model_config(exchange)
(folder / "first").mkdir(parents=True)
write_weights(exchange, folder / "first", config, torch.float32, limit)  # loads what is loaded once
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = kilobytes("VmRSS")
write_weights(exchange, folder, config, torch.float32, limit)
print((kilobytes("VmHWM") - before) * 1024)
"""


class TestSize:
    def test_the_files_of_65_billion_parameters_are_known_without_memory(self) -> None:
        c = SIXTY_FIVE
        num_parameters = sum(math.prod(size) for size in exchange_shapes(c).values())
        assert 64e9 < num_parameters < 68e9
        parts = plan_parts(c)
        assert len(parts) == 8 * 80 * 8 + 4
        shards = plan_shards(parts, torch.bfloat16, 5 * GB)
        sizes = [sum(part.num_bytes(torch.bfloat16) for part in shard.parts) for shard in shards]
        assert max(sizes) <= 5 * GB
        assert [part for shard in shards for part in shard.parts] == parts
        assert shards[0].file == f"model-00001-of-{len(shards):05}.safetensors"
        # heads of 112 become 128: attention's four matrices grow by a seventh, and nothing else does
        growth = c.num_layers * c.num_ways * 4 * c.width**2 / 7
        assert sum(sizes) == 2 * (num_parameters + growth)
        ways = [part.way for part in parts]
        assert ways == sorted(ways[:-4]) + [None] * 4  # a way's tensors lie together

    @pytest.mark.slow
    def test_memory_stays_below_the_largest_file_and_a_half(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        limit = 8 * 2**20
        c = shape(2, num_layers=4, width=510, num_heads=12, vocab_size=8192)  # heads of 85; an embedding of 16 MiB
        source = exchange(tmp_path / "exchange", float32_model(c), tokenizer)
        result = subprocess.run(
            [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out"), str(limit)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
        assert len(sizes) > 4 and sum(sizes) > 50 * 2**20
        assert int(result.stdout) < 1.5 * limit  # though one of the files holds an embedding of twice the limit


class TestPipeline:
    def test_the_convert_stage_writes_both_folders(self, tmp_path: Path) -> None:
        from kraken.training.train import train

        config = dataclasses.replace(tiny.config(steps=2, precision="float32"), storage=str(tmp_path))
        config = dataclasses.replace(config, convert=ConvertConfig(tensorrt_llm=True))
        storage = Storage(str(tmp_path))
        parents = {"prepare": tiny.prepared(storage.folder("prepare", "tiny"), config)}
        run_folder = storage.folder("pretrain", "tiny")
        train(config, storage.folder("prepare", "tiny"), run_folder)
        parents["pretrain"] = dataclasses.replace(
            parents["prepare"], kind="pretrain", metrics={"steps": Metric(2, "optimizer steps")}
        )
        folder = storage.folder("convert", "c" * 64)
        (folder / TENSORRT_LLM_FOLDER).mkdir()
        (folder / TENSORRT_LLM_FOLDER / "left over").write_text("")
        work = Work(config, "c" * 64, storage, folder, parents, run=None)  # type: ignore[arg-type]
        metrics, details = convert.work(work)
        assert metrics["padding_proven"].value == 1.0 and details["tensorrt_llm"] == TENSORRT_LLM_FOLDER
        inside = Manifest.read(folder / TENSORRT_LLM_FOLDER)
        assert inside.parents == {"convert": "c" * 64}
        inside.verify(folder / TENSORRT_LLM_FOLDER)
        manifest = finish_artefact(
            folder,
            started_at=time.monotonic(),
            kind="convert",
            fingerprint="c" * 64,
            config={},
            parents={},
            metrics=metrics,
            details=details,
        )
        assert f"{TENSORRT_LLM_FOLDER}/config.json" in {record.path for record in manifest.files}
        require_proven(manifest)

    def test_asking_for_it_makes_another_artefact(self) -> None:
        config = tiny.config()
        asked = dataclasses.replace(config, convert=ConvertConfig(tensorrt_llm=True))
        assert fingerprints(STAGES, config)["convert"] != fingerprints(STAGES, asked)["convert"]
        assert fingerprints(STAGES, config)["pretrain"] == fingerprints(STAGES, asked)["pretrain"]
