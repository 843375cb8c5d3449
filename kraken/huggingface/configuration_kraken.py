"""The configuration of a Kraken model for Hugging Face transformers; this file travels with the weights.

Kraken: Prabhakar, Zhang, Wentzlaff, "Kraken", NeurIPS 2024 (arXiv 2408.07802). A layer consists of W ways, independent
parts whose outputs are summed once a layer. Every size below is that of `config.json`.
"""

from typing import Any

from transformers import PretrainedConfig

CHOICES = {
    "architecture": ("kraken", "kraken_delayed", "standard", "parallel"),
    "activation": ("gelu", "swiglu"),
    "positions": ("learned", "rope"),
}


class KrakenConfig(PretrainedConfig):
    """Shape of a model.

    Args:
        architecture: `kraken`; `kraken_delayed`, whose attention and FFN, side by side after one LayerNorm, read the
            other ways a layer later; or one of the two baselines, which have one way: `standard` (GPT-2's block),
            `parallel` (GPT-J's block: attention and FFN side by side after one LayerNorm).
        hidden_size: width of one way.
        num_attention_heads: heads over all ways together.
        ffn_multiple: hidden size of a way's FFN over its width; `swiglu` has two thirds of it, rounded up to 8.
        num_token_ids: ids that the tokenizer has; the vocabulary is padded beyond them. The model asks for it.
        bias: whether linears and LayerNorms add a bias.
        head_dim: channels of one head as the engine that reads the folder computes with them; None is the true number.

    Raises:
        ValueError: a choice that does not exist, or sizes that do not divide.
    """

    model_type = "kraken"
    keys_to_ignore_at_inference = ("past_key_values", "cache")

    def __init__(
        self,
        architecture: str = "kraken",
        num_hidden_layers: int = 12,
        hidden_size: int = 504,
        num_attention_heads: int = 12,
        num_ways: int = 4,
        max_position_embeddings: int = 1024,
        vocab_size: int = 50304,
        num_token_ids: int | None = None,
        ffn_multiple: int = 2,
        activation: str = "gelu",
        positions: str = "learned",
        rope_base: float = 10_000.0,
        bias: bool = False,
        layer_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        head_dim: int | None = None,
        num_key_value_heads: int | None = None,
        intermediate_size: int | None = None,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ):
        found = {"architecture": architecture, "activation": activation, "positions": positions}
        for name, value in found.items():
            if value not in CHOICES[name]:
                raise ValueError(f"{name}={value!r} does not exist; choose one of {CHOICES[name]}")
        if num_attention_heads % num_ways:
            raise ValueError(f"num_attention_heads={num_attention_heads} is not a multiple of num_ways={num_ways}")
        heads_per_way = num_attention_heads // num_ways
        if hidden_size % heads_per_way:
            raise ValueError(f"hidden_size={hidden_size} is not a multiple of the {heads_per_way} heads of a way")
        if not tie_word_embeddings:
            raise ValueError("tie_word_embeddings=False: the head of a Kraken model is its token embedding")
        self.architecture = architecture
        self.num_hidden_layers = num_hidden_layers
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.num_ways = num_ways
        self.max_position_embeddings = max_position_embeddings
        self.vocab_size = vocab_size
        self.num_token_ids = num_token_ids
        self.ffn_multiple = ffn_multiple
        self.activation = activation
        self.positions = positions
        self.rope_base = rope_base
        self.bias = bias
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.head_dim = hidden_size // heads_per_way if head_dim is None else head_dim
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        ffn_size = ffn_multiple * hidden_size
        if activation == "swiglu":
            ffn_size = -(-2 * ffn_size // (3 * 8)) * 8
        self.intermediate_size = ffn_size if intermediate_size is None else intermediate_size
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
