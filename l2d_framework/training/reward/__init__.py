"""Reward models, by which TESS 2 is guided, from preference pairs."""
