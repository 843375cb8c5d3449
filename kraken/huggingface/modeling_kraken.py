"""Kraken for Hugging Face transformers, on one device; this file travels with the weights.

With x_i the input of way i, one layer computes

    a_i  = x_i + Attn_i(LN1_i(x_i))
    S    = sum_j x_j
    x_i' = a_i + FFN_i(LN2_i(a_i + (S - x_i)))         reads the sum of the other ways' inputs

and the first layer has no incoming sum. After the last layer one linear, the conjunction, brings the concatenated ways
back to one width; the head is the token embedding. The `standard` and `parallel` baselines have one way.

The vocabulary is padded beyond the ids of the tokenizer. The logits of the padding ids are -inf, so that probabilities,
loss and generation are over the tokenizer's ids.

Shape letters: B batch, T new tokens, S all tokens of the cache, W ways, D width of a way, N heads per way, H head size,
V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_kraken import KrakenConfig

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What transformers calls the cache: `cache` from 5.24 on, `past_key_values` before."""


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of sums and norms: at least float32."""
    return torch.promote_types(dtype, torch.float32)


class KrakenNorm(nn.LayerNorm):
    """LayerNorm in at least float32; returns the type of its gain."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        exact = exact_dtype(self.weight.dtype)
        bias = None if self.bias is None else self.bias.to(exact)
        normed = F.layer_norm(x_BTD.to(exact), self.normalized_shape, self.weight.to(exact), bias, self.eps)
        return normed.to(self.weight.dtype)


class KrakenAttention(nn.Module):
    """The projections of one way's attention; the model attends for all ways at once."""

    def __init__(self, config: KrakenConfig):
        super().__init__()
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.bias)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)


class KrakenMLP(nn.Module):
    """The FFN of one way: GELU in its tanh form, or SwiGLU with the gate's rows first."""

    def __init__(self, config: KrakenConfig):
        super().__init__()
        self.gated = config.activation == "swiglu"
        num_hidden = (2 if self.gated else 1) * config.intermediate_size
        self.c_fc = nn.Linear(config.hidden_size, num_hidden, bias=config.bias)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden = self.c_fc(x_BTD)
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * hidden
        else:
            hidden = F.gelu(hidden, approximate="tanh")
        return self.c_proj(hidden)


class KrakenSubLayer(nn.Module):
    """The parameters of one way in one layer."""

    def __init__(self, config: KrakenConfig):
        super().__init__()
        size, eps, bias = config.hidden_size, config.layer_norm_eps, config.bias
        self.ln_1 = KrakenNorm(size, eps=eps, bias=bias)
        self.attn = KrakenAttention(config)
        has_one_norm = config.architecture in ("kraken_delayed", "parallel")
        self.ln_2 = None if has_one_norm else KrakenNorm(size, eps=eps, bias=bias)
        self.mlp = KrakenMLP(config)


class KrakenTransformer(nn.Module):
    """Everything but the head. `h[way][layer]`, as the weights are named."""

    def __init__(self, config: KrakenConfig):
        super().__init__()
        size = config.hidden_size
        self.wte = nn.Embedding(config.vocab_size, size)
        self.wpe = nn.Embedding(config.max_position_embeddings, size) if config.positions == "learned" else None
        self.h = nn.ModuleList(
            nn.ModuleList(KrakenSubLayer(config) for _ in range(config.num_hidden_layers))
            for _ in range(config.num_ways)
        )
        joins = config.architecture in ("kraken", "kraken_delayed")
        self.conjunction = nn.Linear(config.num_ways * size, size, bias=config.bias) if joins else None
        self.ln_f = KrakenNorm(size, eps=config.layer_norm_eps, bias=config.bias)


class KrakenForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model. Its cache holds one layer per layer, with the heads of all ways side by side.

    Raises:
        ValueError: the configuration does not say how many ids the tokenizer has.
    """

    config_class = KrakenConfig
    base_model_prefix = "transformer"
    _supports_sdpa = True

    def __init__(self, config: KrakenConfig):
        super().__init__(config)
        if config.num_token_ids is None or not 0 < config.num_token_ids <= config.vocab_size:
            raise ValueError(
                f"num_token_ids={config.num_token_ids}: config.json must give the number of the tokenizer's ids, at "
                f"most vocab_size={config.vocab_size}; the ids beyond only pad the vocabulary and have no probability. "
                "Set it to len(tokenizer)"
            )
        self.transformer = KrakenTransformer(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.transformer.wte = value

    def get_output_embeddings(self) -> None:
        """None: the head has no parameters of its own."""
        return

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Logits [B, T, V] of the next token, of the last `logits_to_keep` positions (0: all); -inf for padding ids.

        Args:
            attention_mask: [B, S], zero for padding, or a mask [B, 1, T, S] as transformers prepares it.
            labels: [B, T]; position t is compared with label t + 1, and -100 is left out.
            cache: the same as `past_key_values`, by its name in transformers 5.24 and newer.
            cache_position: [T], places of the new tokens in the cache; None continues it.
        Raises:
            ValueError: neither or both of ids and embeddings, two caches, a position past the context, or an output
                that this model does not give.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if output_attentions or output_hidden_states:
            raise ValueError("output_attentions and output_hidden_states are not available; leave them out")
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one argument; give one of them")
        cache = past_key_values if cache is None else cache
        x_BTD = self.transformer.wte(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = DynamicCache()
        num_past = 0 if cache is None else cache.get_seq_length()
        if cache_position is None:
            cache_position = torch.arange(x_BTD.shape[1], device=x_BTD.device) + num_past
        if position_ids is None:
            position_ids = positions_of(attention_mask, cache_position)
        hidden_BTD = self._hidden(x_BTD, attention_mask, position_ids, cache, cache_position)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = F.linear(hidden_BTD[:, kept], self.transformer.wte.weight)
        logits_BTV[..., self.config.num_token_ids :] = -torch.inf
        loss = None
        if labels is not None:
            if logits_BTV.shape[1] != labels.shape[1]:
                raise ValueError("labels need the logits of every position; leave out logits_to_keep")
            logits = logits_BTV[:, :-1].to(exact_dtype(logits_BTV.dtype))
            loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        output = CausalLMOutputWithPast(loss=loss, logits=logits_BTV, **{CACHE: cache if use_cache else None})
        return output.to_tuple() if return_dict is False else output

    def _hidden(
        self, x_BTD: Tensor, attention_mask: Tensor | None, position_ids: Tensor, cache: Cache | None, places_T: Tensor
    ) -> Tensor:
        """The normalised state [B, T, D] that the head reads."""
        transformer, config = self.transformer, self.config
        rotation = None
        if transformer.wpe is None:
            rotation = rotation_of(position_ids, self._head_size, config.rope_base)
        else:
            if not torch.compiler.is_compiling() and int(position_ids.max()) >= config.max_position_embeddings:
                raise ValueError(
                    f"position {int(position_ids.max())} is past the context of {config.max_position_embeddings} "
                    "tokens; shorten the prompt or lower max_new_tokens"
                )
            x_BTD = x_BTD + transformer.wpe(position_ids)
        ways = earlier = [x_BTD] * config.num_ways
        for index in range(config.num_hidden_layers):
            earlier, ways = ways, self._layer(index, ways, earlier, rotation, attention_mask, cache, places_T)
        if transformer.conjunction is None:
            return transformer.ln_f(ways[0])
        return transformer.ln_f(transformer.conjunction(torch.cat(ways, dim=-1)))

    def _layer(
        self,
        index: int,
        ways: list[Tensor],
        earlier: list[Tensor],
        rotation: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None,
        cache: Cache | None,
        places_T: Tensor,
    ) -> list[Tensor]:
        """Inputs of the ways -> inputs of the next layer. `earlier` are those of the layer before."""
        parts = [way[index] for way in self.transformer.h]
        seen = ways
        if self.config.architecture == "kraken_delayed" and index > 0:
            total = torch.stack(earlier).sum(dim=0, dtype=exact_dtype(earlier[0].dtype))
            seen = [(x + (total - y)).to(x.dtype) for x, y in zip(ways, earlier, strict=True)]
        normed = [part.ln_1(x) for part, x in zip(parts, seen, strict=True)]
        # [B, T, 3*D] of every way -> three of [B, T, W*N, H]; q, k, v in that order
        qkv = [
            part.attn.c_attn(x).unflatten(-1, (3, -1, self._head_size)) for part, x in zip(parts, normed, strict=True)
        ]
        q, k, v = torch.cat(qkv, dim=3).unbind(dim=2)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, index, {"cache_position": places_T})
        mask = mask_of(attention_mask, places_T, k.shape[2])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        heads = out.transpose(1, 2).flatten(2).chunk(len(parts), dim=-1)
        after = [x + part.attn.c_proj(y) for part, x, y in zip(parts, ways, heads, strict=True)]
        if parts[0].ln_2 is None:
            return [a + part.mlp(x) for part, a, x in zip(parts, after, normed, strict=True)]
        seen = after
        if self.config.architecture == "kraken" and index > 0:
            total = torch.stack(ways).sum(dim=0, dtype=exact_dtype(ways[0].dtype))
            seen = [a + (total - x) for a, x in zip(after, ways, strict=True)]
        return [a + part.mlp(part.ln_2(y)) for part, a, y in zip(parts, after, seen, strict=True)]

    @property
    def _head_size(self) -> int:
        return self.config.hidden_size * self.config.num_ways // self.config.num_attention_heads


def positions_of(attention_mask: Tensor | None, places_T: Tensor) -> Tensor:
    """Positions in the context, [B or 1, T]: padding is not counted."""
    if attention_mask is None or attention_mask.dim() != 2:
        return places_T[None]
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -len(places_T) :]


def mask_of(attention_mask: Tensor | None, places_T: Tensor, num_keys: int) -> Tensor:
    """What each new token may read, [B or 1, 1, T, S]: itself, and what is before it and no padding."""
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask[..., :num_keys]
    keys_S = torch.arange(num_keys, device=places_T.device)
    mask = (keys_S[None, :] <= places_T[:, None])[None, None]
    if attention_mask is not None:
        padded = F.pad(attention_mask.bool(), (0, max(0, num_keys - attention_mask.shape[1])))
        mask = mask & padded[:, None, None, :num_keys]
        mask = mask | (keys_S[None, :] == places_T[:, None])  # a row of padding alone would give NaN
    return mask


def rotation_of(position_ids: Tensor, head_size: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, 1, H/2]: pair i turns by position * base^(-2i/H)."""
    exponents = torch.arange(0, head_size, 2, device=position_ids.device, dtype=torch.float32) / head_size
    angles = (position_ids[..., None].float() * base**-exponents)[:, :, None]
    return angles.cos(), angles.sin()


def rotate(x_BTNH: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn channel i and channel i + H/2 as a pair."""
    cos, sin = rotation
    first, second = x_BTNH.to(exact_dtype(x_BTNH.dtype)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTNH.dtype)
