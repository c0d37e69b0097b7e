"""Measuring generated text."""
