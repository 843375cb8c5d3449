"""Kraken: data, model, training, conversion, engine and evaluation as a plain library."""

__version__ = "0.1.0"
