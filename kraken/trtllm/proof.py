"""Proof that a TensorRT-LLM folder's padded tensors give the logits of the exchange folder's.

The arithmetic of TensorRT-LLM is written out here in plain torch, way after way, and compared with
`kraken/model/architecture.py` on random weights. Shape letters as there; P is the padded head size.
"""

import dataclasses
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kraken.config import ModelConfig
from kraken.convert import exchange_parts, exchange_shapes
from kraken.evaluate import Parity
from kraken.manifest import ArtefactError, Manifest, Metric
from kraken.model.architecture import Kraken, is_vector
from kraken.model.residual_norm import LAYER_NORM_EPSILON
from kraken.trtllm.parts import padded_head_size, padded_tensors

TOLERANCE = 1e-5
"""Largest absolute difference of float32 logits, padded and not."""
MAX_WEIGHTS = 2**28
"""A proof takes two ways of a model whose two layers have more weights than this, which is 1 GB."""


def proof_shape(config: ModelConfig) -> ModelConfig:
    """A smaller model with the same ways and heads: two layers, few positions and ids."""
    shape = dataclasses.replace(config, num_layers=min(config.num_layers, 2), context_length=32, vocab_size=256)
    num_weights = sum(math.prod(size) for size in exchange_shapes(shape).values())
    if num_weights <= MAX_WEIGHTS or config.num_ways <= 2:
        return shape
    return dataclasses.replace(shape, num_ways=2, num_heads=2 * config.heads_per_way)


def prove_padding(config: ModelConfig, seed: int = 0) -> Parity:
    """Compare the logits of random weights, padded and not, in float32 and at every position of a full context.

    Gains and biases are random too, so that each of them counts.
    """
    model = Kraken(config).requires_grad_(False)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if is_vector(name):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    tensors = padded_tensors(config, exchange_parts(model), torch.float32)
    ids_BT = torch.randint(config.vocab_size, (1, config.context_length), generator=generator)
    with torch.inference_mode():
        expected_TV = model(ids_BT)[0]
        found_TV = padded_logits(tensors, config, ids_BT)[0, :, : config.vocab_size]
    best_two = expected_TV.topk(2).values
    decided = best_two[:, 0] - best_two[:, 1] > TOLERANCE
    return Parity(
        max_abs_diff=float((found_TV - expected_TV).abs().max()),
        num_tokens=len(expected_TV),
        num_different=int((decided & (found_TV.argmax(-1) != expected_TV.argmax(-1))).sum()),
        tolerance=TOLERANCE,
    )


def padded_logits(tensors: Mapping[str, Tensor], config: ModelConfig, ids_BT: Tensor) -> Tensor:
    """Logits [B, T, padded V] as TensorRT-LLM computes them of the folder's tensors, in plain torch on one device."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        gain, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
        return F.layer_norm(x, gain.shape, gain, bias, LAYER_NORM_EPSILON)

    def attention(x: Tensor, name: str) -> Tensor:
        heads = (config.heads_per_way, padded_head_size(config))
        q, k, v = (linear(x, f"{name}.{letter}").unflatten(-1, heads).transpose(1, 2) for letter in "qkv")
        out_BNTP = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # divides by the root of the padded size
        return linear(out_BNTP.transpose(1, 2).flatten(2), f"{name}.o")

    def ffn(x: Tensor, name: str) -> Tensor:
        hidden = linear(x, f"{name}.fc")
        if config.activation == "swiglu":
            gate, hidden = hidden.chunk(2, dim=-1)
            return linear(F.silu(gate) * hidden, f"{name}.proj")
        return linear(F.gelu(hidden, approximate="tanh"), f"{name}.proj")

    x_BTD = tensors["embed_tokens.weight"][ids_BT] + tensors["embed_positions.weight"][: ids_BT.shape[1]]
    ways = [x_BTD] * config.num_ways
    for layer in range(config.num_layers):
        total = torch.stack(ways).sum(dim=0)
        outputs = []
        for way, x in enumerate(ways):
            prefix = f"ways.{way}.layers.{layer}"
            normed = norm(x, f"{prefix}.ln_1")
            a = x + attention(normed, f"{prefix}.attn")
            if config.architecture == "parallel":
                outputs.append(a + ffn(normed, f"{prefix}.mlp"))
                continue
            seen = a + (total - x) if config.architecture == "kraken" and layer > 0 else a
            outputs.append(a + ffn(norm(seen, f"{prefix}.ln_2"), f"{prefix}.mlp"))
        ways = outputs
    joined = linear(torch.cat(ways, dim=-1), "conjunction") if config.architecture == "kraken" else ways[0]
    return F.linear(norm(joined, "ln_f"), tensors["embed_tokens.weight"])


def proof_metrics(proof: Parity) -> dict[str, Metric]:
    """A proof as a manifest keeps it."""
    return {
        "padding_max_abs_diff": Metric(proof.max_abs_diff, "logits"),
        "padding_tolerance": Metric(proof.tolerance, "logits"),
        "padding_proven": Metric(float(proof.passed), "1 = yes"),
    }


def require_proven(manifest: Manifest) -> None:
    """Refuse a TensorRT-LLM folder, or an exchange folder with one, whose proof of parity failed.

    Raises:
        ArtefactError: with the difference found.
    """
    if "padding_proven" in manifest.metrics and manifest.value("padding_proven") != 1.0:
        raise ArtefactError(
            f"padded heads change the logits by {manifest.value('padding_max_abs_diff'):.2e} "
            f"(at most {manifest.value('padding_tolerance'):.0e} is accepted); serve the model with engine.kind=torch "
            "and convert.tensorrt_llm=False"
        )
