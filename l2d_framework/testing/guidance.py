"""Laws of guidance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l2d_framework.guidance import Guidance
from l2d_framework.testing.laws import Laws, ensure, ensure_close
from l2d_framework.testing.toys import ToyGuided, ToyPredict, ToySpace
from l2d_framework.types import Prediction, Query

law = Laws(torch.no_grad())

_VOCAB, _SIZE, _CLASSES = 11, 6, 3


@law
def check_guidance_shapes(guidance: Guidance) -> None:
    """Logits are (B, L, V) and a clean state is (B, L, D), finite and without gradients, from t = 0 to t = 1."""
    for time in (0.0, 0.5, 1.0):
        for condition in (None, _query().condition):
            query = _query().replace(t=torch.full((2, 3), time), condition=condition, shared_time=time)
            guided = _guide(guidance, query)
            for name, value, size in (("logits", guided.logits, _VOCAB), ("clean", guided.clean, _SIZE)):
                if value is None:
                    continue
                ensure(value.shape == (2, 3, size), f"{name} has shape {tuple(value.shape)}, not {(2, 3, size)}.")
                ensure(value.dtype == torch.float32, f"{name} has dtype {value.dtype}, not float32.")
                ensure(value.isfinite().all(), f"{name} is not finite at t = {time}.")
                ensure(not value.requires_grad, f"{name} keeps a graph of gradients; detach it.")


@law
def check_guidance_leaves_its_inputs(guidance: Guidance) -> None:
    """Neither the query nor the logits of the prediction it wraps are changed in place."""
    query, fresh, predict = _query(), _query(), _net()
    guidance(predict, query, _space(query))
    ensure(bool(predict.given), "The guidance never asked for a prediction.")
    ensure(torch.equal(query.x, fresh.x) and torch.equal(query.t, fresh.t), "The query was changed in place.")
    ensure(all(torch.equal(now, then) for now, then in predict.given), "The wrapped logits were changed in place.")


@law
def check_guidance_is_rowwise(guidance: Guidance) -> None:
    """A row is guided alike alone and beside others."""
    together = _guide(guidance, _query())
    for row in (0, 1):
        alone = _guide(guidance, _query(slice(row, row + 1)))
        ensure_close(together.logits[row : row + 1], alone.logits, "a row's logits must not depend on its batch mates")
        ensure_close(_clean(together)[row : row + 1], _clean(alone), "a row's state must not depend on its batch mates")


def _has_neutral(guidance: Guidance) -> bool:
    return guidance.neutral_scale is not None


@law.where(_has_neutral)
def check_guidance_is_neutral(guidance: Guidance) -> None:
    """At its neutral scale, its own or the request's, guidance changes no bit of the prediction it wraps.

    That includes the clean state which a guidance further inside may have set.
    """
    assert guidance.neutral_scale is not None
    neutral = type(guidance).model_validate({**guidance.model_dump(), "scale": guidance.neutral_scale})
    requested = _query().replace(guidance_scale=torch.full((2, 3), guidance.neutral_scale))
    for asked, query in ((neutral, _query()), (guidance, requested)):
        for predict in (_net(), ToyGuided(_VOCAB, _SIZE, _CLASSES)):
            plain, guided = predict(query), asked(predict, query, _space(query))
            change = float((guided.logits - plain.logits).abs().max())
            ensure(torch.equal(guided.logits, plain.logits), f"At its neutral scale the logits change by {change:.3g}.")
            claim = f"At its neutral scale the clean state changes, asked from {type(predict).__name__}."
            ensure(torch.equal(_clean(guided), _clean(plain)), claim)


@law.where(_has_neutral)
def check_guidance_obeys_requested_scales(guidance: Guidance) -> None:
    """A scale given with the request replaces the guidance's own, position by position."""
    assert guidance.neutral_scale is not None
    strong = guidance.neutral_scale + 2.0
    scales = torch.full((2, 3), guidance.neutral_scale)
    scales[1] = strong
    own = type(guidance).model_validate({**guidance.model_dump(), "scale": strong})
    requested, everywhere = _guide(guidance, _query().replace(guidance_scale=scales)), _guide(own, _query())
    plain = _net()(_query())
    for asked, unguided, guided in (
        (requested.logits, plain.logits, everywhere.logits),
        (_clean(requested), _clean(plain), _clean(everywhere)),
    ):
        ensure_close(asked[0], unguided[0], "a row that asks for the neutral scale must stay; use scales(query)")
        ensure_close(asked[1], guided[1], "a row that asks for a scale must be guided by it; use scales(query)")
    ensure(not torch.equal(guided, unguided), f"At scale {strong} the guidance changes nothing at all.")


def _net() -> ToyPredict:
    return ToyPredict(_VOCAB, _SIZE, _CLASSES)


def _guide(guidance: Guidance, query: Query) -> Prediction:
    return guidance(_net(), query, _space(query))


def _space(query: Query) -> ToySpace:
    return ToySpace(_VOCAB, _SIZE, len(query.positions))


def _clean(prediction: Prediction) -> Tensor:
    return ToySpace(_VOCAB, _SIZE).estimate(prediction.logits) if prediction.clean is None else prediction.clean


def _query(rows: slice = slice(None)) -> Query:
    generator = torch.Generator().manual_seed(3)
    x, t = torch.randn(2, 3, _SIZE, generator=generator), torch.rand(2, 3, generator=generator)
    positions, condition = torch.tensor([[4, 5, 6], [2, 3, 4]]), torch.tensor([[0, 0, 0], [2, 2, 2]])
    nothing: Any = None  # the toy network remembers none
    return Query(x[rows], t[rows], positions[rows], context=nothing, condition=condition[rows])
