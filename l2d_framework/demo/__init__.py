"""The demonstration: a tiny language model becomes a diffusion language model on synthetic text."""
