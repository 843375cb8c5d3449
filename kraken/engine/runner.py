"""The runner: forward passes of a model over its cache. It knows rows and tokens, not requests."""

import torch
from torch import Tensor

from kraken.engine.kv_cache import KVCache
from kraken.model import Kraken


class Runner:
    """Owns the model and the cache on one device.

    Args:
        model: weights in the engine's type, on its device.
        num_ids: ids of the tokenizer; logits of the padding ids beyond are cut off here, once and for all.
        num_rows: requests decoded together.
    """

    def __init__(self, model: Kraken, num_ids: int, num_rows: int):
        self.model = model
        self.num_ids = num_ids
        self.device = model.wte.weight.device
        self.cache = KVCache(model.config, num_rows, model.wte.weight.dtype, self.device)

    @torch.inference_mode()
    def prefill(self, row: int, token_ids: list[int], all_positions: bool) -> Tensor:
        """Run a whole prompt into a row.

        Returns:
            float32 logits [T or 1, ids]: of every position, or only of the last.
        """
        ids_BT = torch.tensor([token_ids], device=self.device)
        hidden_TD = self.model.hidden(ids_BT, attend=self.cache.prefill(row))[0]
        return self._logits(hidden_TD if all_positions else hidden_TD[-1:])

    @torch.inference_mode()
    def decode(self, token_ids: list[int], positions: list[int]) -> Tensor:
        """Feed one token to each of the first `len(token_ids)` rows.

        Returns:
            float32 logits [rows, ids].
        """
        ids_BT = torch.tensor(token_ids, device=self.device)[:, None]
        positions_R = torch.tensor(positions, device=self.device)
        hidden_BTD = self.model.hidden(ids_BT, positions_R[:, None], self.cache.decode(positions_R))
        return self._logits(hidden_BTD[:, 0])

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.readout(hidden)[..., : self.num_ids].float()
