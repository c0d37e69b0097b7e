"""The simplex of TESS 2: the state space, and states kept as tokens and seeds."""

from l2d_plugins.parametrizations.simplex.space import Simplex, SimplexConfig

__all__ = ["Simplex", "SimplexConfig"]
