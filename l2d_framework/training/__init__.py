"""Training: data, next-token and denoising losses on transformers' Trainer, resumption, and the card of a run."""
