"""The base class of layers."""

from torch import nn


class DecoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
