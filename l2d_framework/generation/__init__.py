"""Prompts to answers: the loop over blocks, gaps in a text, the interface of transformers' models."""
