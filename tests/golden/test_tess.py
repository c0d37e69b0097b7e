"""The authors' weights in this package reproduce the authors' numbers up to the rounding of float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import shared_folders
import torch
from golden_device import DEVICE
from golden_tess import TIMES, Case, query, replay, slots, take
from torch import Tensor

from l2d_framework.diffusion.logits import dense
from l2d_framework.diffusion.loss import denoising_loss
from l2d_framework.diffusion.training_noise import Draws
from l2d_plugins.parametrizations.simplex.space import likeliest
from l2d_plugins.schedules.cosine import Cosine
from l2d_plugins.solvers.renoise import Renoise


def _folders() -> list[Path]:
    found = shared_folders.find("L2D_GOLDEN_DIR", "golden")
    return [] if found is None else sorted(path.parent for path in (found / "tess").glob("*/*_meta.json"))


@pytest.fixture(scope="module", params=_folders() or [None], ids=lambda folder: folder.name if folder else "none")
def case(request: pytest.FixtureRequest, golden_dir: Path) -> Case:
    if request.param is None:
        pytest.skip(f"no cases in {golden_dir / 'tess'}")
    return Case.read(request.param)


def _close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=tolerance)


def _time(index: Tensor, steps: int = TIMES) -> Tensor:
    return 1 - index.float() / steps


def test_golden_schedule_tables(case: Case) -> None:
    for name, wanted in case.io.items():
        if name.startswith("schedule.alphas_cumprod."):
            steps = int(name.rpartition(".")[2])
            exact = 1 - torch.arange(steps, dtype=torch.float64) / steps
            assert torch.equal((Cosine().alpha(exact) ** 2).float(), wanted), name
            t = _time(torch.arange(steps), steps)
            _close(Cosine().alpha(t) ** 2, wanted, 1e-6)


def test_golden_noising(case: Case) -> None:
    io, model = case.io, case.model()
    _close(dense(model.parametrization.encode(io["input_ids"], model.backbone.table())), io["simplex.clean"], 0)
    for times, wanted in (
        ("noise.timesteps", "noise.noisy_simplex"),
        ("tokenwise.timesteps", "tokenwise.noisy_simplex"),
    ):
        # In float32, 1 - t of the least noisy steps has a relative error of 1e-5.
        found = model.diffuse(io["input_ids"], 1 - io[times].double() / TIMES, io["noise.standard_normal"])
        _close(dense(found), io[wanted], 5e-6)
    _close(1 - _time(io["noise.timesteps"]), io["noise.timesteps_scaled"], 1e-7)


@pytest.mark.parametrize(
    ("name", "mix", "has_previous"),
    [
        ("uniform_prev", "mean", False),
        ("given_prev", "mean", True),
        ("no_selfcond", "none", False),
        ("variant_logits_addition", "sum", True),
        ("variant_logits_max", "max", True),
        ("variant_logits_multiply", "product", True),
    ],
)
def test_golden_logits(case: Case, name: str, mix: str, has_previous: bool) -> None:
    io, model, layout = case.io, case.model(mix), case.layout()
    previous = io["forward.previous_pred"] if has_previous else None
    asked = query(model, layout, io["noise.noisy_simplex"], _time(io["noise.timesteps"]), previous)
    positions, valid = slots(layout)
    with torch.no_grad():
        features = model.features(asked)
        logits = model(asked).logits
    _close(logits, take(io[f"forward.{name}.logits"], positions), 1e-5)
    if f"forward.{name}.last_hidden" in io:
        _close(features, take(io[f"forward.{name}.last_hidden"], positions - 1), 1e-5)
    losses = torch.nn.functional.cross_entropy(logits[valid], take(layout.tokens, positions)[valid], reduction="none")
    if f"forward.{name}.loss_mean" in io:
        _close(losses.mean(), io[f"forward.{name}.loss_mean"], 1e-5)
    if f"forward.{name}.loss_none" in io:
        row = valid.nonzero()[:, 0]
        sums = torch.zeros(len(valid)).index_add(0, row, losses)
        _close(sums / valid.sum(1), io[f"forward.{name}.loss_none"], 1e-5)
    if f"forward.{name}.loss_mean_padmasked" in io:
        kept = take(layout.tokens, positions)[valid] != case.meta["config"]["pad_token_id"]
        _close(losses[kept].mean(), io[f"forward.{name}.loss_mean_padmasked"], 1e-5)


def test_golden_logits_in_bfloat16(case: Case) -> None:
    io, model, layout = case.io, case.model().bfloat16(), case.layout()
    time, previous = _time(io["noise.timesteps"]), io["forward.previous_pred"]
    with torch.no_grad():
        logits = model(query(model, layout, io["noise.noisy_simplex"], time, previous)).logits
    wanted = take(io["forward.given_prev.logits"], slots(layout)[0])
    # Three digits a number, in two layers.
    assert (logits - wanted).norm() <= 0.04 * wanted.norm()


def test_golden_logits_with_every_position_noised(case: Case) -> None:
    io, model, layout = case.io, case.model(), case.layout()
    layout = type(layout)(layout.tokens, torch.ones_like(layout.tokens))
    previous = io["forward.previous_pred"]
    asked = query(model, layout, io["noise.noisy_simplex"], _time(io["noise.timesteps"]), previous)
    with torch.no_grad():
        logits = model(asked).logits
    _close(logits, io["forward.allnoised.logits"], 1e-5)
    losses = torch.nn.functional.cross_entropy(logits[:, 1:].mT, layout.tokens[:, 1:], reduction="none")
    _close(losses.mean(), io["forward.allnoised.loss_mean"], 1e-5)
    # The authors divide by the length although nothing predicts the first token.
    _close(losses.sum(1) / layout.tokens.shape[1], io["forward.allnoised.loss_none"], 1e-5)


def test_golden_logits_with_a_time_per_token(case: Case) -> None:
    io, model, layout = case.io, case.model(), case.layout()
    previous = io["forward.previous_pred"]
    asked = query(model, layout, io["tokenwise.noisy_simplex"], _time(io["tokenwise.timesteps"]), previous)
    with torch.no_grad():
        _close(model(asked).logits, take(io["tokenwise.logits"], slots(layout)[0]), 1e-5)


@pytest.mark.parametrize("mode", ["selfcond_off", "selfcond_on"])
def test_golden_training_gradients(case: Case, mode: str) -> None:
    io, model, layout = case.io, case.model(), case.layout()
    positions, valid = slots(layout)
    index = io[f"train.{mode}.timesteps"][:, None].expand(positions.shape)
    t = _time(index)
    draws = Draws(
        positions=positions,
        valid=valid,
        t=t,
        noise=take(io[f"train.{mode}.standard_normal"], positions),
        kept=torch.ones_like(valid),
        first_t=model.schedule.noisier(t),
        conditioned=torch.full((len(positions),), mode == "selfcond_on"),
    )
    losses = denoising_loss(model, layout, draws, chunk=7)
    loss = losses.total / losses.count
    _close(loss.detach(), io[f"train.{mode}.loss"], 1e-5)
    loss.backward()
    names: dict[str, Any] = {f"backbone.lm.{name}": p for name, p in model.backbone.lm.named_parameters()}
    names["backbone.lm.timestep_embed.weight"] = model.get_parameter("backbone.time.weight")
    prefix = f"train.{mode}.grad."
    wanted = {name.removeprefix(prefix): value for name, value in io.items() if name.startswith(prefix)}
    assert wanted
    for name, value in wanted.items():
        _close(names[f"backbone.lm.{name}"].grad, value, 1e-5)


class _Step:
    """One step's recorded estimate and noise."""

    def __init__(self, clean: Tensor, noise: Tensor) -> None:
        self.schedule, self._clean, self._noise = Cosine(), clean, noise

    def clean(self, *_: Any, **__: Any) -> Tensor:
        return self._clean

    def velocity(self, *_: Any, **__: Any) -> Tensor:
        raise AssertionError("renoising needs no slope")

    def fresh_noise(self, x: Tensor) -> Tensor:
        return self._noise


def test_golden_steps(case: Case) -> None:
    io, model = case.io, case.model()
    space = model.parametrization
    clean = space.estimate(io["forward.previous_pred"], torch.zeros(1), torch.zeros(1), _NoNumbers())
    _close(dense(clean), io["step.projected"], 0)
    noise = case.k * io["noise.standard_normal"]
    for index in range(1, case.steps):
        if f"step.t{index}.prev_sample" in io:
            times = (1 - index / case.steps, 1 - (index - 1) / case.steps)
            found = Renoise().step(_Step(clean, noise), clean, *times)
            _close(dense(found), io[f"step.t{index}.prev_sample"], 5e-6)
    _close(dense(clean), io["step.t0.prev_sample"], 0)
    reached = _time((io["step.tokenwise.timesteps"] - 1).clamp_min(0), case.steps)
    reached = torch.where(io["step.tokenwise.timesteps"] == 0, 1.0, reached)
    found = model.schedule.interpolate(clean, noise, reached)
    _close(dense(found), io["step.tokenwise.prev_sample"], 5e-6)


class _NoNumbers:
    device = DEVICE

    def uniform(self) -> Tensor:
        raise AssertionError("an argmax draws nothing")

    def normal(self, size: int) -> Tensor:
        raise AssertionError("an argmax draws nothing")

    def seeds(self) -> Tensor:
        raise AssertionError("an argmax draws nothing")


def test_golden_nucleus_sets(case: Case) -> None:
    found = [name for name in case.io if name.startswith("nucleus.")]
    assert found
    for name in found:
        top_p, temperature = (float(part[1:].removeprefix("au")) for part in name[8:-5].split("_"))
        logits = case.io["forward.previous_pred"] / temperature
        _, inside, order = likeliest(logits, top_p, logits.shape[-1])
        assert torch.equal(torch.zeros_like(inside).scatter(-1, order, inside), case.io[name]), name


def test_golden_reverse_process(case: Case) -> None:
    io, model, layout = case.io, case.model(), case.layout("sample.input_ids", "sample.span_mask")
    noises = [io["sample.initial_standard_normal"], *(io[f"sample.step{i}.standard_normal"] for i in range(case.steps))]
    with torch.no_grad():
        seen, _ = replay(model, layout, noises=noises, steps=case.steps, solver=Renoise())
    positions, valid = slots(layout)
    assert len(seen) == case.steps
    for i, evaluation in enumerate(seen):
        _close(dense(evaluation.x), take(io[f"sample.step{i}.simplex_in"], positions), 5e-6)
        _close(evaluation.logits, take(io[f"sample.step{i}.logits"], positions), 1e-5)
    tokens = seen[-1].logits.argmax(-1)
    assert torch.equal(tokens[valid], take(io["sample.final_ids"], positions)[valid])


def test_golden_deterministic_process(case: Case) -> None:
    io, model, layout = case.io, case.model(), case.layout("sample.input_ids", "sample.span_mask")
    with torch.no_grad():
        seen, _ = replay(
            model,
            layout,
            noises=[io["guided_sample.initial_standard_normal"]],
            steps=case.steps,
            solver=Renoise(deterministic=True),
            estimate={"mode": "average"},
        )
    positions, _ = slots(layout)
    recorded = [i for i in range(case.steps) if f"ddim_sample.step{i}.simplex_in" in io]
    assert recorded
    for i in recorded:
        _close(dense(seen[i].x), take(io[f"ddim_sample.step{i}.simplex_in"], positions), 1e-5)
