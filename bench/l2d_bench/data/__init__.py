"""Data and base models that a profile makes, a kind in each module."""
