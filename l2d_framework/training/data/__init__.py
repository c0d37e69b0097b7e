"""Texts and conversations to examples and batches."""
