"""Makers of the embedded model ``tiny-v4``: data, tokenizer, training, export and evaluation."""
