"""Every component that ships with the project obeys every law of its kind."""

from importlib import metadata

import pytest

from l2d_framework.hooks import GROUP
from l2d_framework.registry import Registry
from l2d_framework.testing import parametrize_with_checks

OURS = Registry.load(e for e in metadata.distribution("l2d-framework").entry_points if e.group == GROUP)
BUILT_IN = {(kind, name): found for kind in OURS.kinds() for name, found in OURS.components(kind).items()}

VARIANTS = [
    ("schedule", "linear", {"times": "cosmap", "minimum_noise": 0.1, "velocity_scaling": "edm"}),
    ("parametrization", "embedding", {"size": 16, "estimate": {"mode": "argmax"}, "self_conditioning": "add"}),
    ("parametrization", "embedding", {"bayes_skip": True}),
    ("parametrization", "embedding", {"estimate": {"mode": "average", "renormalize": True}}),
    ("parametrization", "embedding", {"estimate": {"temperature": {"name": "constant", "value": 0.7}}}),
    ("backbone", "two_stream", {"num_classes": 3, "rank": 4, "targets": ["q_proj", "up_proj"]}),
    ("backbone", "two_stream", {"variant": "full", "carry": True}),
    ("backbone", "two_stream", {"variant": "full_random", "num_classes": 1}),
    ("schedule", "cosine", {"steps": None}),
    ("schedule", "information", {"family": "gumbel", "base": {"name": "cosine"}}),
    ("schedule", "information", {"base": {"name": "linear", "minimum_noise": 0.1}, "uniform": 0.01}),
    ("parametrization", "simplex", {"k": 3.0, "estimate": {"mode": "nucleus", "top_p": 0.9, "temperature": 0.7}}),
    ("parametrization", "simplex", {"estimate": {"mode": "nucleus", "top_p": 1.0}, "self_conditioning": "none"}),
    ("parametrization", "simplex", {"estimate": {"mode": "average"}, "self_conditioning": "sum"}),
    ("parametrization", "simplex", {"self_conditioning": "max", "train_table": True}),
    ("parametrization", "simplex", {"self_conditioning": "product"}),
    ("backbone", "in_place", {"attention": "causal", "num_classes": 2}),
    ("backbone", "in_place", {"initialization": "random", "time_bias": True}),
    ("backbone", "in_place", {"label_shift": False, "num_classes": 1}),
    ("solver", "renoise", {"deterministic": True}),
    ("solver", "euler", {"churn": 1.0}),
    ("guidance", "classifier_free", {"scale": 2.0}),
    *(("solver", "torchdiffeq_fixed", {"method": method}) for method in ("euler", "heun2", "heun3", "rk4")),
    *(("solver", "torchdiffeq_adaptive", {"method": method}) for method in ("dopri8", "bosh3", "fehlberg2")),
]


@parametrize_with_checks(
    [found() for found in BUILT_IN.values() if not any(field.is_required() for field in found.model_fields.values())]
    + [BUILT_IN[kind, name].model_validate(fields) for kind, name, fields in VARIANTS]
)
def test_conformance(component, check):
    check(component)


def test_no_plugin_of_ours_is_broken():
    assert not OURS.broken


@pytest.mark.parametrize("kind", OURS.kinds())
def test_every_kind_ships_with_a_component(kind):
    assert OURS.components(kind)
