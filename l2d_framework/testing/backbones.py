"""Laws of backbones, over a tiny random Llama."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from l2d_framework.backbone import BackboneConfig
from l2d_framework.testing.laws import Laws, distance, ensure, ensure_close
from l2d_framework.testing.scenes import (
    KNOWN,
    LENGTH,
    Scene,
    block_sizes,
    built,
    known_layout,
    noisy_scenes,
    tiny_llama,
)
from l2d_framework.types import Layout

law = Laws(torch.no_grad(), built)

_VISIBLE = 1e-3
"""Smallest relative change that counts as an effect."""


@law
def check_backbone_shapes(config: BackboneConfig) -> None:
    """The table is (V, H), features (B, L, H), logits (B, L, V) in float32, and at least one block size is served."""
    ensure(bool(block_sizes(config)), "check() refuses every block size: 1, 2 and null.")
    _, backbone, scene = next(noisy_scenes(config))
    again = built(backbone.config)
    weights, weights_again = ({n: w.shape for n, w in module.state_dict().items()} for module in (backbone, again))
    ensure(
        again.config == backbone.config and weights_again == weights,
        f"Built from {config!r}, the module's config is {backbone.config!r}, from which another one is built.",
    )
    expected = (backbone.lm.config.vocab_size, backbone.lm.config.hidden_size)
    own = (backbone.vocab_size, backbone.hidden_size)
    for name, shape in (("table()", backbone.table().shape), ("(vocab_size, hidden_size)", own)):
        ensure(shape == expected, f"{name} is {tuple(shape)}, the language model's table {expected}.")
    features = scene.ask(backbone)
    ensure(isinstance(backbone.head, nn.Module), f"head must be a module; it is {backbone.head!r}.")
    logits = backbone.head(features)
    ensure(features.shape == scene.h.shape, f"features are {tuple(features.shape)}, not {tuple(scene.h.shape)}.")
    is_sound = logits.shape == (*features.shape[:2], backbone.vocab_size) and logits.dtype == torch.float32
    ensure(is_sound, f"head gave {tuple(logits.shape)} {logits.dtype}.")
    ensure(logits.isfinite().all(), "Logits are not finite.")
    ensure_close(backbone.head(features[:, 1:2]), logits[:, 1:2], "head must treat every position alike")


@law
def check_backbone_uses_state_and_time(config: BackboneConfig) -> None:
    """The noisy state and its time change what is said about a position."""
    for size, backbone, scene in noisy_scenes(config):
        base = scene.ask(backbone)
        for name, other in {
            "noisy state": scene.ask(backbone, h=scene.h.flip(-1)),
            "time": scene.ask(backbone, t=scene.t + 0.4),
        }.items():
            ensure(distance(other, base) > _VISIBLE, f"The {name} changes nothing with block_size={size}.")


@law
def check_backbone_units(config: BackboneConfig) -> None:
    """No weight is in two units, and weights of a unit are read only while one of its modules runs."""
    for size, backbone, scene in noisy_scenes(config):
        units = backbone.units()
        owner: dict[int, int] = {}
        for number, unit in enumerate(units):
            for module in unit:
                for name, weight in module.named_parameters():
                    other = owner.setdefault(id(weight), number)
                    ensure(other == number, f"Weight {name!r} is in the units {other} and {number}; make them one.")
        wanted = [backbone.head(scene.ask(backbone)), backbone.table().clone()]
        with _weights_gone(units):
            found = [backbone.head(scene.ask(backbone)), backbone.table()]
        for what, before, after in zip(("Logits", "The table"), wanted, found, strict=True):
            ensure(
                torch.equal(before, after), f"{what} need weights of a unit that does not run, with block_size={size}."
            )


@law
def check_backbone_does_not_leak(config: BackboneConfig) -> None:
    """A noisy position sees every clean token of an earlier block and no token of its own or a later one."""
    for size, backbone, scene in noisy_scenes(config):
        base = scene.ask(backbone)
        for changed in range(LENGTH):
            other = scene.ask(backbone, layout=_changed(scene.layout, changed))
            for place, position in enumerate(scene.positions[0].tolist()):
                effect = distance(other[:, place], base[:, place])
                where = f"token {changed} and position {position} with block_size={size}: relative change {effect:.3g}"
                if scene.layout.blocks[0, changed] < scene.layout.blocks[0, position]:
                    ensure(effect > _VISIBLE, f"A noisy position does not see an earlier block: {where}.")
                else:
                    ensure(effect <= 1e-6, f"A noisy position sees its own or a later block: {where}.")


@law
def check_backbone_denoises_blocks_apart(config: BackboneConfig) -> None:
    """A block says the same among the others of a text and alone after the tokens before it, as it is generated."""
    for size, backbone, scene in noisy_scenes(config):
        together = scene.ask(backbone)
        context = backbone.read(Layout(scene.layout.tokens[:, :KNOWN], scene.layout.blocks[:, :KNOWN]))
        step = size or LENGTH - KNOWN
        for first in range(0, LENGTH - KNOWN, step):
            block = slice(first, first + step)
            alone = Scene(scene.layout, scene.places[block])
            features = alone.ask(backbone, context=context, h=scene.h[:, block], t=scene.t[:, block])
            claim = f"a block must answer alike alone and among others with block_size={size}"
            ensure_close(features, together[:, block], claim)
            context = backbone.extend(context, scene.layout.tokens[:, KNOWN:][:, block])


@law
def check_backbone_trains_as_it_generates(config: BackboneConfig) -> None:
    """Features are the same where gradients are recorded."""
    for size, backbone, scene in noisy_scenes(config):
        expected = scene.ask(backbone)
        with torch.enable_grad():
            recorded = scene.ask(backbone).detach()
        ensure_close(recorded, expected, f"recording gradients must not matter with block_size={size}")


@law
def check_backbone_sees_later_where_declared(config: BackboneConfig) -> None:
    """A noisy position sees the known tokens after it if, and only if, the backbone declares `sees_later`."""
    layout, place = known_layout(), 4
    layout.blocks[:, place] = 1
    scene = Scene(layout, [place])
    for size, backbone, _ in noisy_scenes(config):
        base = scene.ask(backbone)
        for later in range(place + 1, LENGTH):
            effect = distance(scene.ask(backbone, layout=_changed(layout, later)), base)
            ensure(
                effect > _VISIBLE if backbone.sees_later else effect <= 1e-6,
                f"sees_later is {backbone.sees_later} with block_size={size}, but known token {later} changes what is "
                f"said about position {place} by {effect:.3g}.",
            )


@law
def check_backbone_extends_what_it_read(config: BackboneConfig) -> None:
    """Reading a text at once, in two parts or block by block is the same, also after padding."""
    layout = known_layout(padding=2)
    for size, backbone, _ in noisy_scenes(config):
        step, blocks = size or 1, layout.blocks.clone()
        if size is not None:
            blocks[:, 5:] = 1 + torch.arange(LENGTH - 5) // size
        whole = backbone.read(Layout(layout.tokens, blocks))
        part = Layout(layout.tokens[:, :5], layout.blocks[:, :5])
        at_once = backbone.extend(backbone.read(part), layout.tokens[:, 5:])
        stepwise = backbone.read(part)
        for i in range(5, LENGTH, step):
            stepwise = backbone.extend(stepwise, layout.tokens[:, i : i + step])
        # Inside what was just appended only blocks of one token can be asked about.
        for name, context, places in (
            ("extend(tokens)", at_once, [6, 7, 8] if size == 1 else [8]),
            ("extending block by block", stepwise, [8]),
        ):
            extended, at_once_read = (Scene(layout, places).ask(backbone, context=c) for c in (context, whole))
            ensure_close(extended, at_once_read, f"{name} must equal read(all) with block_size={size}")


@law
def check_backbone_ignores_padding(config: BackboneConfig) -> None:
    """A row padded on the left says the same as that row alone, whatever token the padding holds."""
    padding = 2
    for size, backbone, scene in noisy_scenes(config):
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


@law
def check_backbone_selects_rows(config: BackboneConfig) -> None:
    """Selected rows answer as before, in their new order, and extending them leaves the original alone."""
    layout, rows = known_layout(padding=2), torch.tensor([1, 0, 1])
    scene = Scene(layout, [LENGTH])
    for _, backbone, _ in noisy_scenes(config):
        context = backbone.read(layout)
        expected = scene.ask(backbone, context=context)
        chosen = context.select(rows)
        picked = Scene(Layout(layout.tokens[rows], layout.blocks[rows]), [LENGTH])
        features = picked.ask(backbone, context=chosen, h=scene.h[rows])
        ensure_close(features, expected[rows], "select must keep the chosen rows as they are")
        backbone.extend(chosen, layout.tokens[rows, :1])
        claim = "extending selected rows must not change the context they came from"
        ensure_close(scene.ask(backbone, context=context), expected, claim)


@law
def check_backbone_shared_time(config: BackboneConfig) -> None:
    """A time known on the host gives the same features as the same time in a tensor."""
    for _, backbone, scene in noisy_scenes(config):
        for time in (0.0, 0.25, 0.75):
            t = torch.full_like(scene.t, time)
            features = scene.ask(backbone, t=t, shared_time=time)
            ensure_close(features, scene.ask(backbone, t=t), f"shared_time must not matter at t = {time}")


@law
def check_backbone_unconditional_is_no_class(config: BackboneConfig) -> None:
    """Class -1 and no class at all are the same, for a whole batch and for single positions."""
    _, backbone, scene = next(noisy_scenes(config))
    expected = scene.ask(backbone)
    condition = torch.full_like(scene.t, -1, dtype=torch.int64)
    ensure_close(scene.ask(backbone, condition=condition), expected, "class -1 must equal no class")
    if config.num_classes:
        condition[0] = 0
        ensure_close(scene.ask(backbone, condition=condition)[1:], expected[1:], "class -1 must equal no class")


@law.where(lambda backbone: backbone.config.num_classes)
def check_backbone_uses_classes(config: BackboneConfig) -> None:
    """A class changes what is said about a position."""
    _, backbone, scene = next(noisy_scenes(config))
    base = scene.ask(backbone)
    for label in range(config.num_classes):
        other = scene.ask(backbone, condition=torch.full_like(scene.t, label, dtype=torch.int64))
        ensure(distance(other, base) > _VISIBLE, f"Class {label} of {config.num_classes} changes nothing.")


@law.where(lambda backbone: backbone.independent_positions)
def check_backbone_positions_are_independent(config: BackboneConfig) -> None:
    """A position answers alike alone, among others, and asked about twice with different states."""
    for _, backbone, scene in noisy_scenes(config):
        context = backbone.read(scene.layout)
        together = scene.ask(backbone, context=context)
        first = int(scene.positions[0, 0])
        alone = Scene(scene.layout, [first]).ask(backbone, context=context, h=scene.h[:, :1], t=scene.t[:, :1])
        ensure_close(alone, together[:, :1], "a position must answer alike alone and among others")
        h, t = torch.cat([scene.h[:, :1].flip(-1), scene.h], 1), torch.cat([scene.t[:, :1], scene.t], 1)
        twice = Scene(scene.layout, [first, *scene.positions[0].tolist()]).ask(backbone, context=context, h=h, t=t)
        ensure_close(twice[:, 1:], together, "a second question about a position must not change the first")


@law.where(lambda backbone: backbone.rewinds)
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


@law.where(lambda backbone: backbone.joins)
def check_backbone_joins(config: BackboneConfig) -> None:
    """Rows of several contexts in one go on as each does alone, whatever padding comes and goes."""
    backbone, layout = built(config), known_layout(padding=2)
    tokens, end = layout.tokens, LENGTH - 1
    short = Layout(tokens[:, 3:5], torch.tensor([[0, 0], [-1, -1]]))
    texts = [tokens[0, :end], tokens[1, 2:end], short.tokens[0], short.tokens[1, :0]]
    for rows, slots in (([0, 1], end), ([0, 1], end + 3), ([1], end - 2), ([], 2)):
        for is_fixed in (False, True):
            read = backbone.read(Layout(tokens[:, :KNOWN], layout.blocks[:, :KNOWN]))
            long = backbone.extend(read, tokens[:, KNOWN:end]).select(torch.tensor(rows, dtype=torch.int64))
            if is_fixed and (long := backbone.fixed(long, LENGTH + 1, LENGTH + 1)) is None:
                continue
            chosen = [*rows, 2, 3]
            last = tokens[[number % 2 for number in chosen], end:]
            joined = backbone.join([long, backbone.read(short)], slots) if rows else backbone.read(short)
            context = backbone.extend(joined, last)
            scene = Scene(Layout(last, torch.zeros_like(last)), [slots + 1])
            found = scene.ask(backbone, context=context)
            for place, number in enumerate(chosen):
                text = torch.cat([texts[number], last[place]])[None]
                alone = Scene(Layout(text, torch.zeros_like(text)), [text.shape[1]])
                wanted = alone.ask(backbone, h=scene.h[place : place + 1])
                claim = f"a row that is joined to others in {slots} slots must go on as alone (fixed: {is_fixed})"
                ensure_close(found[place : place + 1], wanted, claim)


@law.where(lambda backbone: backbone.carries)
def check_backbone_carries(config: BackboneConfig) -> None:
    """What an evaluation leaves is as wide as the next one's input, made position by position, and zero for zero."""
    for _, backbone, scene in noisy_scenes(config):
        hidden = scene.ask(backbone)
        more = backbone.carry(hidden)
        ensure(more.shape == scene.h.shape, f"carry gave {tuple(more.shape)} for {tuple(scene.h.shape)}.")
        ensure(more.isfinite().all(), "carry gave numbers that are not finite.")
        ensure(not backbone.carry(torch.zeros_like(hidden)).any(), "carry must give zeros for zeros")
        ensure_close(backbone.carry(hidden[:, 1:2]), more[:, 1:2], "carry must treat every position alike")
        ensure(distance(scene.h + more, scene.h) > _VISIBLE, "What is carried changes nothing.")


@law
def check_backbone_merge_changes_nothing(config: BackboneConfig) -> None:
    """Getting ready to generate changes neither the answers nor a single weight of the language model."""
    lm = tiny_llama()
    weights = [(weight, weight.clone()) for weight in lm.parameters()]
    for _, backbone, scene in noisy_scenes(config, lm):
        before = backbone.head(scene.ask(backbone))
        backbone.merge("always")
        ensure_close(backbone.head(scene.ask(backbone)), before, "folding must not change the logits")
    ensure(all(torch.equal(now, then) for now, then in weights), "merge changes a weight of the language model.")


@law.where(lambda backbone: backbone.compiles)
def check_backbone_compiles_for_one_question(config: BackboneConfig) -> None:
    """Compiled layers say what they say as they are, and run only for the question that asks for them."""
    for _, backbone, scene in noisy_scenes(config):
        wanted = scene.ask(backbone)
        with torch.compiler.set_stance("force_eager"), catch_warnings():  # which needs no compiler
            simplefilter("ignore", DeprecationWarning)  # of torch, where it brings its compiler in
            ensure_close(scene.ask(backbone, compiled=True), wanted, "compiled layers must say what they say otherwise")
        with torch.compiler.set_stance("fail_on_recompile"):
            try:
                again = scene.ask(backbone)
            except RuntimeError as error:
                raise AssertionError("Layers are compiled for a question that does not ask for it.") from error
        ensure_close(again, wanted, "a question before must not matter")


@law.where(lambda backbone: backbone.identity_at_zero)
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


@law.where(lambda backbone: backbone.identity_at_zero)
def check_backbone_leaves_the_language_model(config: BackboneConfig) -> None:
    """The language model itself answers as before it was wrapped."""
    lm, layout = tiny_llama(), known_layout()
    expected = lm(layout.tokens, use_cache=False).logits
    backbone = built(config, lm)
    Scene(layout, [LENGTH]).ask(backbone)
    ensure(torch.equal(lm(layout.tokens, use_cache=False).logits, expected), "The language model's own logits changed.")


@law.where(lambda backbone: backbone.trains_lm)
def check_backbone_names_its_head_parameters(config: BackboneConfig) -> None:
    """Whatever weight the head uses is among its parameters, or the loss would train nothing there."""
    backbone = built(config).requires_grad_(True)
    features = torch.randn(2, 3, backbone.hidden_size, generator=torch.Generator().manual_seed(9))
    weights = dict(backbone.named_parameters())
    with torch.enable_grad():
        backbone.head(features).square().sum().backward()
    named = {id(weight) for weight in backbone.head.parameters()}
    used = [name for name, weight in weights.items() if weight.grad is not None]
    missing = [name for name in used if id(weights[name]) not in named]
    ensure(bool(used), "The head uses no trainable weight.")
    ensure(not missing, f"head.parameters() leaves out {missing}, which the head uses.")


def _changed(layout: Layout, place: int) -> Layout:
    """The layout with other tokens at one place."""
    tokens = layout.tokens.clone()
    tokens[:, place] += 5
    return Layout(tokens, layout.blocks)


@contextmanager
def _weights_gone(units: Sequence[Sequence[nn.Module]]) -> Iterator[None]:
    """Make weights of units no numbers but while a module of the unit runs."""
    kept: list[tuple[nn.Parameter, Tensor]] = []
    handles: list[RemovableHandle] = []
    for unit in units:
        weights = {id(weight): weight for module in unit for weight in module.parameters()}.values()
        here = [(weight, weight.detach().clone()) for weight in weights]
        kept += here

        def come(*_: object, here: list[tuple[nn.Parameter, Tensor]] = here) -> None:
            for weight, value in here:
                weight.data.copy_(value)

        def go(*_: object, here: list[tuple[nn.Parameter, Tensor]] = here) -> None:
            for weight, _value in here:
                weight.data.fill_(torch.nan)

        go()
        for module in unit:
            handles += [module.register_forward_pre_hook(come), module.register_forward_hook(go)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for weight, value in kept:
            weight.data.copy_(value)
