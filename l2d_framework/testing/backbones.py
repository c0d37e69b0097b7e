"""Laws of backbones, over a tiny random Llama."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from l2d_framework.backbone import BackboneConfig
from l2d_framework.testing.assertions import distance, ensure, ensure_close
from l2d_framework.testing.inner_models import (
    check_backbone_is_the_language_model_at_zero,
    check_backbone_leaves_the_language_model,
    check_backbone_merge_changes_nothing,
    check_backbone_names_its_head_parameters,
)
from l2d_framework.testing.scenes import KNOWN, LENGTH, Scene, block_sizes, built, known_layout, noisy_scenes
from l2d_framework.types import Layout

_VISIBLE = 1e-3
"""Smallest relative change that counts as an effect."""


def backbone_checks(config: BackboneConfig) -> Sequence[Callable[[Any], None]]:
    """Laws of every backbone, and those of the capabilities it declares.

    Args:
        config: any backbone.

    Returns:
        The checks.
    """
    checks = [
        check_backbone_shapes,
        check_backbone_uses_state_and_time,
        check_backbone_does_not_leak,
        check_backbone_denoises_blocks_apart,
        check_backbone_trains_as_it_generates,
        check_backbone_extends_what_it_read,
        check_backbone_ignores_padding,
        check_backbone_selects_rows,
        check_backbone_shared_time,
        check_backbone_sees_later_where_declared,
        check_backbone_unconditional_is_no_class,
        check_backbone_merge_changes_nothing,
    ]
    backbone = built(config)
    if config.num_classes:
        checks.append(check_backbone_uses_classes)
    if backbone.identity_at_zero:
        checks += [check_backbone_is_the_language_model_at_zero, check_backbone_leaves_the_language_model]
    if backbone.independent_positions:
        checks.append(check_backbone_positions_are_independent)
    if backbone.rewinds:
        checks.append(check_backbone_rewinds)
    if backbone.trains_lm:
        checks.append(check_backbone_names_its_head_parameters)
    return checks


@torch.no_grad()
def check_backbone_shapes(config: BackboneConfig) -> None:
    """The table is (V, H), features (B, L, H), logits (B, L, V) in float32, and at least one block size is served."""
    backbone = built(config)
    ensure(bool(block_sizes(config)), "check() refuses every block size: 1, 2 and null.")
    again = built(backbone.config)
    shapes, shapes_again = ({n: w.shape for n, w in module.state_dict().items()} for module in (backbone, again))
    ensure(
        again.config == backbone.config and shapes_again == shapes,
        f"Built from {config!r}, the module's config is {backbone.config!r}, from which another one is built.",
    )
    expected = (backbone.lm.config.vocab_size, backbone.lm.config.hidden_size)
    for name, shape in {
        "table()": tuple(backbone.table().shape),
        "(vocab_size, hidden_size)": (backbone.vocab_size, backbone.hidden_size),
    }.items():
        ensure(shape == expected, f"{name} is {shape}, the language model's table {expected}.")
    _, scene = next(noisy_scenes(backbone))
    features = scene.ask(backbone)
    ensure(isinstance(backbone.head, nn.Module), f"head must be a module; it is {backbone.head!r}.")
    logits = backbone.head(features)
    ensure(features.shape == scene.h.shape, f"features are {tuple(features.shape)}, not {tuple(scene.h.shape)}.")
    ensure(
        logits.shape == (*features.shape[:2], backbone.vocab_size) and logits.dtype == torch.float32,
        f"head gave {tuple(logits.shape)} {logits.dtype}.",
    )
    ensure(logits.isfinite().all(), "Logits are not finite.")
    ensure_close(backbone.head(features[:, 1:2]), logits[:, 1:2], "head must treat every position alike")


@torch.no_grad()
def check_backbone_uses_state_and_time(config: BackboneConfig) -> None:
    """The noisy state and its time change what is said about a position."""
    backbone = built(config)
    for size, scene in noisy_scenes(backbone):
        base = scene.ask(backbone)
        for name, other in {
            "noisy state": scene.ask(backbone, h=scene.h.flip(-1)),
            "time": scene.ask(backbone, t=scene.t + 0.4),
        }.items():
            ensure(distance(other, base) > _VISIBLE, f"The {name} changes nothing with block_size={size}.")


@torch.no_grad()
def check_backbone_does_not_leak(config: BackboneConfig) -> None:
    """A noisy position sees every clean token of an earlier block and no token of its own or a later one."""
    backbone = built(config)
    for size, scene in noisy_scenes(backbone):
        base = scene.ask(backbone)
        for changed in range(LENGTH):
            tokens = scene.layout.tokens.clone()
            tokens[:, changed] = (tokens[:, changed] + 5) % backbone.vocab_size
            other = scene.ask(backbone, layout=Layout(tokens, scene.layout.blocks))
            for place, position in enumerate(scene.positions[0].tolist()):
                effect = distance(other[:, place], base[:, place])
                where = f"token {changed} and position {position} with block_size={size}: relative change {effect:.3g}"
                if scene.layout.blocks[0, changed] < scene.layout.blocks[0, position]:
                    ensure(effect > _VISIBLE, f"A noisy position does not see an earlier block: {where}.")
                else:
                    ensure(effect <= 1e-6, f"A noisy position sees its own or a later block: {where}.")


@torch.no_grad()
def check_backbone_denoises_blocks_apart(config: BackboneConfig) -> None:
    """A block says the same among the others of a text and alone after the tokens before it, as it is generated."""
    backbone = built(config)
    for size, scene in noisy_scenes(backbone):
        together = scene.ask(backbone)
        context = backbone.read(Layout(scene.layout.tokens[:, :KNOWN], scene.layout.blocks[:, :KNOWN]))
        step = size or LENGTH - KNOWN
        for first in range(0, LENGTH - KNOWN, step):
            block = slice(first, first + step)
            alone = Scene(scene.layout, scene.places[block])
            found = alone.ask(backbone, context=context, h=scene.h[:, block], t=scene.t[:, block])
            ensure_close(
                found, together[:, block], f"a block must answer alike alone and among others with block_size={size}"
            )
            context = backbone.extend(context, scene.layout.tokens[:, KNOWN:][:, block])


def check_backbone_trains_as_it_generates(config: BackboneConfig) -> None:
    """Features are the same where gradients are recorded."""
    backbone = built(config)
    for size, scene in noisy_scenes(backbone):
        with torch.no_grad():
            expected = scene.ask(backbone)
        found = scene.ask(backbone).detach()
        ensure_close(found, expected, f"recording gradients must not matter with block_size={size}")


@torch.no_grad()
def check_backbone_sees_later_where_declared(config: BackboneConfig) -> None:
    """A noisy position sees the known tokens after it if, and only if, the backbone declares `sees_later`."""
    backbone, place = built(config), 4
    layout = known_layout()
    blocks = layout.blocks.clone()
    blocks[:, place] = 1
    scene = Scene(Layout(layout.tokens, blocks), [place])
    for size, _ in noisy_scenes(backbone):
        base = scene.ask(backbone)
        for later in range(place + 1, LENGTH):
            tokens = layout.tokens.clone()
            tokens[:, later] = (tokens[:, later] + 5) % backbone.vocab_size
            effect = distance(scene.ask(backbone, layout=Layout(tokens, blocks)), base)
            ensure(
                effect > _VISIBLE if backbone.sees_later else effect <= 1e-6,
                f"sees_later is {backbone.sees_later} with block_size={size}, but known token {later} changes what is "
                f"said about position {place} by {effect:.3g}.",
            )


@torch.no_grad()
def check_backbone_extends_what_it_read(config: BackboneConfig) -> None:
    """Reading a text at once, in two parts or block by block is the same, also after padding."""
    backbone = built(config)
    layout = known_layout(padding=2)
    for size, _ in noisy_scenes(backbone):
        step, blocks = size or 1, layout.blocks.clone()
        if size is not None:
            blocks[:, 5:] = 1 + torch.arange(LENGTH - 5) // size
        whole = backbone.read(Layout(layout.tokens, blocks))
        part = Layout(layout.tokens[:, :5], layout.blocks[:, :5])
        at_once = backbone.extend(backbone.read(part), layout.tokens[:, 5:])
        # Inside what was just appended only blocks of one token can be asked about.
        scene = Scene(layout, [6, 7, 8] if size == 1 else [8])
        ensure_close(
            scene.ask(backbone, context=at_once),
            scene.ask(backbone, context=whole),
            f"extend(tokens) must equal read(all) with block_size={size}",
        )
        stepwise = backbone.read(part)
        for i in range(5, LENGTH, step):
            stepwise = backbone.extend(stepwise, layout.tokens[:, i : i + step])
        scene = Scene(layout, [8])
        ensure_close(
            scene.ask(backbone, context=stepwise),
            scene.ask(backbone, context=whole),
            f"extending block by block must equal read(all) with block_size={size}",
        )


@torch.no_grad()
def check_backbone_ignores_padding(config: BackboneConfig) -> None:
    """A row padded on the left says the same as that row alone, whatever token the padding holds."""
    backbone, padding = built(config), 2
    for size, scene in noisy_scenes(backbone):
        blocks = scene.layout.blocks.clone()
        blocks[1, :padding] = -1
        alone = Scene(
            Layout(scene.layout.tokens[1:, padding:], blocks[1:, padding:]), (scene.positions[0] - padding).tolist()
        )
        expected = alone.ask(backbone, h=scene.h[1:], t=scene.t[1:])
        for filler in (0, 7):
            tokens = scene.layout.tokens.clone()
            tokens[1, :padding] = filler
            padded = scene.ask(backbone, layout=Layout(tokens, blocks))
            ensure_close(padded[1:], expected, f"padding must not matter with block_size={size}")


@torch.no_grad()
def check_backbone_selects_rows(config: BackboneConfig) -> None:
    """Selected rows answer as before, in their new order, and extending them leaves the original alone."""
    backbone = built(config)
    layout, rows = known_layout(padding=2), torch.tensor([1, 0, 1])
    scene = Scene(layout, [LENGTH])
    for _ in noisy_scenes(backbone):
        context = backbone.read(layout)
        expected = scene.ask(backbone, context=context)
        chosen = context.select(rows)
        picked = Scene(Layout(layout.tokens[rows], layout.blocks[rows]), [LENGTH])
        found = picked.ask(backbone, context=chosen, h=scene.h[rows])
        ensure_close(found, expected[rows], "select must keep the chosen rows as they are")
        backbone.extend(chosen, layout.tokens[rows, :1])
        ensure_close(
            scene.ask(backbone, context=context),
            expected,
            "extending selected rows must not change the context they came from",
        )


@torch.no_grad()
def check_backbone_shared_time(config: BackboneConfig) -> None:
    """A time known on the host gives the same features as the same time in a tensor."""
    backbone = built(config)
    for _, scene in noisy_scenes(backbone):
        for time in (0.0, 0.25, 0.75):
            t = torch.full_like(scene.t, time)
            found = scene.ask(backbone, t=t, shared_time=time)
            ensure_close(found, scene.ask(backbone, t=t), f"shared_time must not matter at t = {time}")


@torch.no_grad()
def check_backbone_unconditional_is_no_class(config: BackboneConfig) -> None:
    """Class -1 and no class at all are the same, for a whole batch and for single positions."""
    backbone = built(config)
    _, scene = next(noisy_scenes(backbone))
    expected = scene.ask(backbone)
    condition = torch.full_like(scene.t, -1, dtype=torch.int64)
    ensure_close(scene.ask(backbone, condition=condition), expected, "class -1 must equal no class")
    if config.num_classes:
        condition[0] = 0
        ensure_close(scene.ask(backbone, condition=condition)[1:], expected[1:], "class -1 must equal no class")


@torch.no_grad()
def check_backbone_uses_classes(config: BackboneConfig) -> None:
    """A class changes what is said about a position."""
    backbone = built(config)
    _, scene = next(noisy_scenes(backbone))
    base = scene.ask(backbone)
    for label in range(config.num_classes):
        other = scene.ask(backbone, condition=torch.full_like(scene.t, label, dtype=torch.int64))
        ensure(distance(other, base) > _VISIBLE, f"Class {label} of {config.num_classes} changes nothing.")


@torch.no_grad()
def check_backbone_positions_are_independent(config: BackboneConfig) -> None:
    """A position answers alike alone, among others, and asked about twice with different states."""
    backbone = built(config)
    for _, scene in noisy_scenes(backbone):
        context = backbone.read(scene.layout)
        together = scene.ask(backbone, context=context)
        first = int(scene.positions[0, 0])
        alone = Scene(scene.layout, [first]).ask(backbone, context=context, h=scene.h[:, :1], t=scene.t[:, :1])
        ensure_close(alone, together[:, :1], "a position must answer alike alone and among others")
        h, t = torch.cat([scene.h[:, :1].flip(-1), scene.h], 1), torch.cat([scene.t[:, :1], scene.t], 1)
        twice = Scene(scene.layout, [first, *scene.positions[0].tolist()]).ask(backbone, context=context, h=h, t=t)
        ensure_close(twice[:, 1:], together, "a second question about a position must not change the first")


@torch.no_grad()
def check_backbone_rewinds(config: BackboneConfig) -> None:
    """A context from which tokens were taken back goes on as one that never had them, whatever the rows lost."""
    backbone, known = built(config), KNOWN
    layout = known_layout(padding=2)
    part = Layout(layout.tokens[:, :known], layout.blocks[:, :known])
    for kept in ([2, 2], [1, 3], [3, 0]):
        context = backbone.extend(backbone.read(part), layout.tokens[:, known : known + 3])
        shorter = backbone.rewind(context, torch.tensor([3 - count for count in kept]))
        end = known + max(kept)
        last = torch.stack([layout.tokens[row, known + count] for row, count in enumerate(kept)])[:, None]
        scene = Scene(layout, [end + 1])
        found = scene.ask(backbone, context=backbone.extend(shorter, last))
        for row, count in enumerate(kept):
            alone = backbone.read(Layout(layout.tokens[:, : known + count + 1], layout.blocks[:, : known + count + 1]))
            wanted = Scene(layout, [known + count + 1]).ask(backbone, context=alone, h=scene.h, t=scene.t)
            ensure_close(found[row], wanted[row], f"rewinding rows to {kept} tokens must leave what they had")
