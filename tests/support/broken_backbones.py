"""For each law of the conformance kit about backbones, networks that break it: (check, config, part of the message)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from toy_components import Beside, BesideNetwork, Canvas, CanvasNetwork, Read, appended

from l2d_framework.testing import backbones
from l2d_framework.types import Layout


class Changed(nn.Module):
    """What a function makes of a head."""

    def __init__(self, head, change):
        super().__init__()
        self.head, self.change = head, change

    def forward(self, features):
        return self.change(self.head, features)


class HalfPrecision(BesideNetwork):
    @property
    def head(self):
        return Changed(super().head, lambda head, features: head(features).bfloat16())


class BatchHead(BesideNetwork):
    @property
    def head(self):
        return Changed(super().head, lambda head, features: head(features - features.mean(1, keepdim=True)))


class HeadlessCall(BesideNetwork):
    """Makes logits in a method, whose parameters nobody can ask for."""

    def head(self, features):
        return self.lm.lm_head(features)


class Misreports(BesideNetwork):
    def __init__(self, config, lm):
        super().__init__(config, lm)
        self.config = config.model_copy(update={"num_classes": config.num_classes + 1})


class Deaf(BesideNetwork):
    def features(self, h, t, positions, context, condition, *, shared_time=None):
        return super().features(torch.zeros_like(h), t, positions, context, condition)


class Timeless(BesideNetwork):
    def features(self, h, t, positions, context, condition, *, shared_time=None):
        return super().features(h, (t > 0).float(), positions, context, condition)


class SplitsWhatIsShared(BesideNetwork):
    def units(self):
        return [*super().units(), [self.lm]]


class ReadsAside(BesideNetwork):
    """Reads a weight of a layer that is not running."""

    def features(self, h, t, positions, context, condition, *, shared_time=None):
        found = super().features(h, t, positions, context, condition)
        return found + next(self.units()[0][0].parameters()).sum()


class OffByOne(BesideNetwork):
    """Reads the hidden state of the position itself, which has seen its token."""

    def main(self, context, positions):
        return super().main(context, (positions + 1).clamp(max=context.hidden.shape[1]))


class Blind(BesideNetwork):
    """Sees the token just before and no other."""

    def main(self, context, positions):
        return self.table()[context.layout.tokens.gather(1, positions - 1)]


class Forgetful(BesideNetwork):
    """Reads what is appended as if nothing had been there before."""

    def extend(self, context, tokens):
        new = self.read(Layout(tokens, torch.zeros_like(tokens))).hidden
        return Read(appended(context.layout, tokens), torch.cat([context.hidden, new], 1))


class TakesAlike(BesideNetwork):
    """Takes as many tokens from every row as from the one that loses fewest."""

    def rewind(self, context, counts):
        return super().rewind(context, counts.min().expand(len(counts)))


class JoinsInFront(BesideNetwork):
    """Puts the new rows in front of the old ones."""

    def join(self, contexts, slots):
        return super().join(contexts[::-1], slots)


class JoinsAsWide(BesideNetwork):
    """Drops first tokens so that all contexts are as wide as the narrowest."""

    def join(self, contexts, slots):
        least = min(context.layout.tokens.shape[1] for context in contexts)
        cut = [Layout(context.layout.tokens[:, -least:], context.layout.blocks[:, -least:]) for context in contexts]
        return super().join([self.read(layout) for layout in cut], slots)


class CarriesSomething(BesideNetwork):
    """Adds something even where there was no evaluation before."""

    def carry(self, hidden):
        return self.mix(hidden)


class CarriesNothing(BesideNetwork):
    def carry(self, hidden):
        return torch.zeros_like(hidden)


class CarriesTheMean(BesideNetwork):
    def carry(self, hidden):
        return super().carry(hidden - hidden.mean(1, keepdim=True))


class PaddingCounts(BesideNetwork):
    def read(self, layout):
        return super().read(Layout(layout.tokens, layout.blocks.clamp(min=0)))


@dataclass(frozen=True)
class Sorted(Read):
    def select(self, rows):
        return super().select(rows.sort().values)


class SortsRows(BesideNetwork):
    def read(self, layout):
        return Sorted(**vars(super().read(layout)))


class SharesState(BesideNetwork):
    """Extending selected rows empties the memory they came from."""

    def __init__(self, config, lm):
        super().__init__(config, lm)
        self.extended = False

    def extend(self, context, tokens):
        self.extended = True
        return super().extend(context, tokens)

    def main(self, context, positions):
        return super().main(context, positions) * (0 if self.extended else 1)


class Rounds(BesideNetwork):
    def features(self, h, t, positions, context, condition, *, shared_time=None):
        t = t if shared_time is None else torch.full_like(t, round(shared_time))
        return super().features(h, t, positions, context, condition)


class LastIsNone(BesideNetwork):
    """Class -1 is the last class, as an index from the end would make it."""

    def features(self, h, t, positions, context, condition, *, shared_time=None):
        if condition is not None:
            condition = torch.where(condition < 0, self.config.num_classes - 1, condition)
        return super().features(h, t, positions, context, condition)


class Classless(BesideNetwork):
    def features(self, h, t, positions, context, condition, *, shared_time=None):
        return super().features(h, t, positions, context, None)


class MergesAway(BesideNetwork):
    def merge(self, how="auto"):
        self.gate.zero_()


class MergesIntoModel(BesideNetwork):
    """Moves a part of the head's weight into the features and the other part stays, which no logit shows."""

    def merge(self, how="auto"):
        self.lm.lm_head.weight.mul_(2)

    @property
    def head(self):
        ratio = self.lm.lm_head.weight.norm() / self.norm
        return Changed(super().head, lambda head, features: head(features) / ratio)

    def __init__(self, config, lm):
        super().__init__(config, lm)
        self.norm = lm.lm_head.weight.norm().detach()


class CompilesEverAfter(BesideNetwork):
    """Goes on with what one question asked for."""

    was_asked = False

    def features(self, h, t, positions, context, condition, *, shared_time=None, compiled=False):
        self.was_asked |= compiled
        return super().features(h, t, positions, context, condition, compiled=self.was_asked)


class CompilesAnother(BesideNetwork):
    def features(self, h, t, positions, context, condition, *, shared_time=None, compiled=False):
        return super().features(h, t * (1 + compiled), positions, context, condition)


class AlmostZero(BesideNetwork):
    def features(self, h, t, positions, context, condition, *, shared_time=None):
        return super().features(h, t + 1e-5, positions, context, condition)


class ZeroForAll(BesideNetwork):
    """Is exact only if the whole batch is at t = 0."""

    def features(self, h, t, positions, context, condition, *, shared_time=None):
        return super().features(h, t if (t == 0).all() else t + 1e-5, positions, context, condition)


class Intrusive(BesideNetwork):
    def __init__(self, config, lm):
        super().__init__(config, lm)
        lm.lm_head.weight.data.mul_(1.01)


class Mixes(BesideNetwork):
    def features(self, h, t, positions, context, condition, *, shared_time=None):
        return super().features(h + h.mean(1, keepdim=True), t, positions, context, condition)


class Peeks(CanvasNetwork):
    """Sees in training the tokens it is to find."""

    def read(self, layout):
        if torch.is_grad_enabled():
            layout = Layout(layout.tokens, layout.blocks.clamp(max=0))
        return super().read(layout)

    def features(self, h, t, positions, context, condition, *, shared_time=None):
        found = super().features(h, t, positions, context, condition)
        known = context.layout.blocks.gather(1, positions) == 0
        return found + known[..., None] * self.table()[context.layout.tokens.gather(1, positions)]


class Counts(BesideNetwork):
    """Answers by how many positions are asked about."""

    def features(self, h, t, positions, context, condition, *, shared_time=None):
        return super().features(h * positions.shape[1], t, positions, context, condition)


class ClaimsLater(BesideNetwork):
    sees_later = True


class OwnHead(CanvasNetwork):
    @property
    def head(self):
        return Changed(nn.Identity(), lambda _, features: self.lm.lm_head(features))


def canvas(network: type[CanvasNetwork]) -> Canvas:
    class Broken(Canvas):
        module = network

    Broken.__name__ = network.__name__
    return Broken()


class HidesLater(CanvasNetwork):
    sees_later = False


def beside(network: type[BesideNetwork], **fields: Any) -> Beside:
    class Broken(Beside):
        module = network

    Broken.__name__ = network.__name__
    return Broken(**fields)


BROKEN = [
    (backbones.check_backbone_shapes, beside(HalfPrecision), "torch.bfloat16"),
    (backbones.check_backbone_shapes, beside(HeadlessCall), "head must be a module"),
    (backbones.check_backbone_shapes, beside(BatchHead), "every position alike"),
    (backbones.check_backbone_shapes, beside(Misreports), "from which another one is built"),
    (backbones.check_backbone_uses_state_and_time, beside(Deaf), "noisy state changes nothing"),
    (backbones.check_backbone_uses_state_and_time, beside(Timeless), "time changes nothing"),
    (backbones.check_backbone_units, beside(SplitsWhatIsShared), "is in the units"),
    (backbones.check_backbone_units, beside(ReadsAside), "Logits need weights of a unit that does not run"),
    (backbones.check_backbone_does_not_leak, beside(OffByOne), "sees its own or a later block"),
    (backbones.check_backbone_does_not_leak, beside(Blind), "does not see an earlier block"),
    (backbones.check_backbone_denoises_blocks_apart, beside(Counts), "alike alone and among others with block_size=1"),
    (backbones.check_backbone_trains_as_it_generates, canvas(Peeks), "recording gradients must not matter"),
    (backbones.check_backbone_sees_later_where_declared, beside(ClaimsLater), "sees_later is True"),
    (backbones.check_backbone_sees_later_where_declared, canvas(HidesLater), "sees_later is False"),
    (backbones.check_backbone_names_its_head_parameters, canvas(OwnHead), r"head.parameters\(\) leaves out"),
    (backbones.check_backbone_extends_what_it_read, beside(Forgetful), r"extend\(tokens\) must equal"),
    (backbones.check_backbone_ignores_padding, beside(PaddingCounts), "padding must not matter"),
    (backbones.check_backbone_selects_rows, beside(SortsRows), "select must keep"),
    (backbones.check_backbone_carries, beside(CarriesSomething, carry=True), "zeros for zeros"),
    (backbones.check_backbone_carries, beside(CarriesNothing, carry=True), "What is carried changes nothing"),
    (backbones.check_backbone_carries, beside(CarriesTheMean, carry=True), "every position alike"),
    (backbones.check_backbone_rewinds, beside(TakesAlike), "rewinding rows to"),
    (backbones.check_backbone_joins, beside(JoinsInFront), "joined to others"),
    (backbones.check_backbone_joins, beside(JoinsAsWide), "joined to others"),
    (backbones.check_backbone_selects_rows, beside(SharesState), "the context they came from"),
    (backbones.check_backbone_shared_time, beside(Rounds), "must not matter at t = 0.25"),
    (backbones.check_backbone_unconditional_is_no_class, beside(LastIsNone, num_classes=2), "must equal no class"),
    (backbones.check_backbone_uses_classes, beside(Classless, num_classes=2), "Class 0 of 2 changes nothing"),
    (backbones.check_backbone_merge_changes_nothing, beside(MergesAway), "must not change the logits"),
    (backbones.check_backbone_merge_changes_nothing, beside(MergesIntoModel), "a weight of the language model"),
    (backbones.check_backbone_compiles_for_one_question, beside(CompilesAnother), "must say what they say otherwise"),
    (backbones.check_backbone_compiles_for_one_question, beside(CompilesEverAfter), "a question that does not ask"),
    (backbones.check_backbone_is_the_language_model_at_zero, beside(AlmostZero), "Logits at t = 0 differ"),
    (backbones.check_backbone_is_the_language_model_at_zero, beside(ZeroForAll), "its neighbours are at another time"),
    (backbones.check_backbone_leaves_the_language_model, beside(Intrusive), "own logits changed"),
    (backbones.check_backbone_positions_are_independent, beside(Mixes), "alone and among others"),
]
