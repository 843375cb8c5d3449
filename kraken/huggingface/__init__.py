"""What makes a folder loadable by Hugging Face transformers: code that is copied into it, and a fast tokenizer.

`configuration_kraken.py` and `modeling_kraken.py` travel with the weights, so they import torch and transformers only,
and nothing of this project; nor does anything here import them.
"""
