"""Training on top of transformers' Trainer: data, tokenizers, optimizer, weight averaging, recipes."""
