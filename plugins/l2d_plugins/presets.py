"""The two methods, and named sampling settings of their papers and of their released code."""

from __future__ import annotations

from typing import Any

from l2d_framework.hooks import hookimpl


@hookimpl
def l2d_methods() -> dict[str, dict[str, Any]]:
    """What `method: NAME` stands for in a run file."""
    l2d: dict[str, Any] = {
        "description": "A diffusion path beside a frozen language model, a token at a time (arXiv:2501.15781).",
        "schedule": {"name": "linear"},
        "parametrization": {"name": "embedding"},
        "backbone": {"name": "two_stream"},
        "sampling": {"preset": "l2d-paper"},
    }
    steps = {
        "description": "L2D whose evaluations go on from the hidden states of the one before, learnt along its own "
        "trajectory, with gates that begin open; it follows no paper.",
        "backbone": {"name": "two_stream", "carry": True, "gates": "open"},
        "training": {"unroll": {}},
    }
    return {
        "l2d": l2d,
        "l2d-steps": l2d | steps,
        "tess": {
            "description": "TESS 2: the language model itself learns to denoise whole answers (arXiv:2502.13917).",
            "schedule": {"name": "cosine"},
            "parametrization": {"name": "simplex"},
            "backbone": {"name": "in_place"},
            "block_size": None,
            "sampling": {"preset": "tess2"},
            "data": {"padding": "target"},
        },
    }


@hookimpl
def l2d_presets() -> dict[str, dict[str, Any]]:
    """Sampling settings by name.

    Paper and released code of L2D differ in the temperature of the estimate: the paper draws a token and anneals the
    temperature linearly to 0; the code takes the most probable token, and anneals on the coding tasks only. TESS 2
    takes the argmax in the paper; its scripts draw from a nucleus, and for the perplexity from everything.

    Source: Cetin et al. 2025, arXiv:2501.15781, Tae et al. 2025, arXiv:2502.13917, and their released code.
    """
    annealed = {"name": "polynomial", "power": 1.0, "end": 1.0}
    midpoint = {"solver": {"name": "midpoint"}, "num_inference_steps": 15}
    fehlberg2 = {"solver": {"name": "fehlberg2", "rtol": 3e-4, "atol": 3e-4}, "num_inference_steps": None}
    return {
        "l2d-paper": _preset(midpoint, annealed),
        "l2d-release": _preset(midpoint, {"name": "constant", "value": 0.0}),
        "l2d-release-coding": _preset(midpoint, annealed),
        "l2d-adaptive": _preset(fehlberg2, annealed),
        "tess2": _tess({"mode": "argmax"}),
        "tess2-release": _tess({"mode": "nucleus", "top_p": 0.99}),
        "tess2-perplexity": _tess({"mode": "nucleus", "top_p": 1.0}),
    }


def _preset(solver: dict[str, Any], temperature: dict[str, Any]) -> dict[str, Any]:
    guidance = [{"name": "classifier_free", "scale": 1.0}]
    return {**solver, "estimate": {"mode": "sample", "temperature": temperature}, "guidance": guidance}


def _tess(estimate: dict[str, Any]) -> dict[str, Any]:
    return {"solver": {"name": "renoise"}, "num_inference_steps": 100, "estimate": estimate}
