"""Token search of the L2D paper."""
