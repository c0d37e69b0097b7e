"""Measuring: lm-evaluation-harness, generated text, token search, diagnosis, a sandbox for models' programs."""
