"""What is measured of a model, a kind in each module."""
