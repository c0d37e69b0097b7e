"""Laws of backbones about the language model inside them."""

from __future__ import annotations

import torch

from l2d_framework.backbone import BackboneConfig
from l2d_framework.testing.assertions import ensure, ensure_close
from l2d_framework.testing.models import tiny_llama
from l2d_framework.testing.scenes import LENGTH, Scene, built, known_layout, noisy_scenes


@torch.no_grad()
def check_backbone_merge_changes_nothing(config: BackboneConfig) -> None:
    """Getting ready to generate changes neither the answers nor a single weight of the language model."""
    lm = tiny_llama()
    weights = [(weight, weight.clone()) for weight in lm.parameters()]
    backbone = built(config, lm)
    for _, scene in noisy_scenes(backbone):
        before = backbone.head(scene.ask(backbone))
        backbone.merge()
        ensure_close(backbone.head(scene.ask(backbone)), before, "folding must not change the logits")
    ensure(all(torch.equal(now, then) for now, then in weights), "merge changes a weight of the language model.")


@torch.no_grad()
def check_backbone_is_the_language_model_at_zero(config: BackboneConfig) -> None:
    """At t = 0, and with no diffusion path at all, logits are bit for bit those of the language model."""
    lm, layout = tiny_llama(), known_layout()
    expected = lm(layout.tokens, use_cache=False).logits
    backbone = built(config, lm)
    scene = Scene(layout, list(range(1, LENGTH + 1)))
    zero = torch.zeros_like(scene.t)
    context = backbone.read(layout)
    for name, features in {
        "at t = 0": scene.ask(backbone, t=zero),
        "at shared_time = 0": scene.ask(backbone, t=zero, shared_time=0.0),
        "of plain()": backbone.plain(scene.positions, context),
    }.items():
        change = float((backbone.head(features) - expected).abs().max())
        ensure(change == 0, f"Logits {name} differ from the language model's by {change:.3g}.")
    mixed = zero.clone()
    mixed[:, ::2] = 0.5
    logits = backbone.head(scene.ask(backbone, t=mixed))
    ensure(
        torch.equal(logits[:, 1::2], expected[:, 1::2]),
        "A position at t = 0 differs from the language model when its neighbours are at another time.",
    )


@torch.no_grad()
def check_backbone_leaves_the_language_model(config: BackboneConfig) -> None:
    """The language model itself answers as before it was wrapped."""
    lm, layout = tiny_llama(), known_layout()
    expected = lm(layout.tokens, use_cache=False).logits
    backbone = built(config, lm)
    Scene(layout, [LENGTH]).ask(backbone)
    ensure(torch.equal(lm(layout.tokens, use_cache=False).logits, expected), "The language model's own logits changed.")


def check_backbone_names_its_head_parameters(config: BackboneConfig) -> None:
    """Whatever weight the head uses is among its parameters, or the loss would train nothing there."""
    backbone = built(config).requires_grad_(True)
    features = torch.randn(2, 3, backbone.hidden_size, generator=torch.Generator().manual_seed(9))
    weights = dict(backbone.named_parameters())
    backbone.head(features).square().sum().backward()
    named = {id(weight) for weight in backbone.head.parameters()}
    used = [name for name, weight in weights.items() if weight.grad is not None]
    missing = [name for name in used if id(weights[name]) not in named]
    ensure(bool(used), "The head uses no trainable weight.")
    ensure(not missing, f"head.parameters() leaves out {missing}, which the head uses.")
