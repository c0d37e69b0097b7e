"""The converted authors' checkpoints reproduce the authors' numbers within the tolerances of the golden README."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import shared_folders
import torch
from golden_l2d import Case, load_case, solver, states
from pydantic import PrivateAttr
from safetensors.torch import load_file
from torch import Tensor

from l2d_framework.guidance import Guidance
from l2d_framework.objective import chunked_cross_entropy
from l2d_framework.registry import registry
from l2d_framework.solver import Solver
from l2d_framework.types import Layout, Predict, Prediction, Query, Space

LORA = {"A": "lora_A.diffusion.weight", "B": "lora_B.diffusion.weight"}
AVERAGE = {"mode": "average", "temperature": {"name": "constant", "value": 1.0}}
ARGMAX = {"mode": "argmax"}


def _folder() -> Path | None:
    found = shared_folders.find("L2D_GOLDEN_DIR", "golden")
    return None if found is None else found / "l2d"


def _names() -> list[str]:
    folder = _folder()
    return (
        []
        if folder is None
        else sorted(p.name.removesuffix(".io.safetensors") for p in folder.glob("*.io.safetensors"))
    )


@pytest.fixture(scope="module", params=_names() or ["none"])
def case(request: pytest.FixtureRequest, golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return load_case(golden_dir / "l2d", request.param, tmp_path_factory.mktemp("golden"))


def _close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=tolerance)


def _everywhere(case: Case) -> Tensor:
    batch, length = case.io["input_ids"].shape
    return torch.arange(length).expand(batch, -1)


def _last(case: Case) -> Tensor:
    return _everywhere(case)[:, -1:]


def test_golden_cases_are_found(golden_dir: Path) -> None:
    assert _names(), f"no cases in {golden_dir / 'l2d'}"


def test_golden_base_logits_and_vocabulary(case: Case) -> None:
    with torch.no_grad():
        logits = case.lm.backbone.lm(case.io["input_ids"]).logits
        table = case.lm.parametrization.codebook(case.lm.backbone.table())
    _close(logits, case.io["base.logits"], 1e-4)
    _close(table, case.io["vocab_table"], 1e-4)


def test_golden_trainable_parameters(case: Case) -> None:
    assert sum(p.numel() for p in case.lm.own_parameters().values()) == case.facts["trainable_parameters"]


def _supervised_loss(case: Case, labels: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    x = case.lm.diffuse(labels.clamp_min(0), t, noise)
    features = case.lm.features(case.query(x, t, _everywhere(case)[:, : t.shape[1]], case.context()))
    wanted = labels >= 0
    total, tokens = chunked_cross_entropy(case.lm.backbone.head, features[wanted], labels[wanted], chunk=5)
    return total / wanted.sum(), tokens


def test_golden_noisy_states(case: Case) -> None:
    labels, t = case.io["labels_shifted"].clamp_min(0), case.io["timesteps"]
    _close(case.lm.diffuse(labels, t, case.io["noise_unit"]).detach(), case.io["x_t"], 1e-4)


def test_golden_training_logits_loss_and_gradients(case: Case) -> None:
    io = case.io
    with torch.no_grad():
        query = case.query(io["x_t"], io["timesteps"], _everywhere(case), case.context())
        _close(case.lm(query).logits, io["train.logits"], 1e-3)
    loss, tokens = _supervised_loss(case, io["labels_shifted"], io["timesteps"], io["noise_unit"])
    _close(loss.detach(), io["train.loss"][0], 1e-3)
    _close(tokens, io["train.token_losses"][io["labels_shifted"] >= 0], 1e-3)
    loss.backward()
    gradients = {name: p.grad for name, p in case.lm.own_parameters().items()}
    case.lm.zero_grad()
    reader = registry().converter("l2d-reference").__globals__["_target"]
    norms = case.facts["checks"]["grad_norms"]
    assert len(norms) == len(gradients)
    for key, norm in norms.items():
        found = gradients[reader(key)]
        assert float(0 if found is None else found.norm()) == pytest.approx(norm, rel=1e-2, abs=1e-5), key
    for key in (key for key in io if key.startswith("grad.")):
        name = key.removeprefix("grad.")
        found = gradients[reader(name)]
        wanted = io[key].T if name.endswith((".A", ".B")) else io[key]
        assert (found - wanted).norm() <= 5e-2 * wanted.norm(), key


def test_golden_unshifted_labels(case: Case) -> None:
    io = case.io
    labels = torch.full_like(io["unshifted.labels"], -100)[:, :-1]
    labels[:] = io["unshifted.labels"][:, 1:]
    t = io["timesteps"][:, :-1]
    with torch.no_grad():
        loss, _ = _supervised_loss(case, labels, t, io["unshifted.noise_unit"])
    _close(loss, io["unshifted.loss"][0], 1e-3)


def test_golden_cached_logits(case: Case) -> None:
    io, context = case.io, case.context()
    with torch.no_grad():
        for t, wanted in zip(io["cached.t"], io["cached.logits"], strict=True):
            times = t.expand(len(io["cached.x"]), 1)
            _close(case.lm(case.query(io["cached.x"], times, _last(case), context)).logits[:, 0], wanted, 5e-4)


def test_golden_left_padded_logits(case: Case) -> None:
    io, lm = case.io, case.lm
    blocks = torch.where(io["padded.attention_mask"].bool(), 0, -1)
    context = lm.backbone.read(Layout(io["padded.input_ids"], blocks))
    with torch.no_grad():
        position = _last(case)[:, :1] * 0 + io["padded.input_ids"].shape[1] - 1
        plain = lm.backbone.head(lm.backbone.plain(position + 1, context))
        _close(plain[:, 0], io["padded.base_logits_last"], 1e-4)
        for t, wanted in zip(io["cached.t"], io["padded.cached_logits"], strict=True):
            times = t.expand(len(io["cached.x"]), 1)
            _close(lm(case.query(io["cached.x"], times, position, context)).logits[:, 0], wanted, 5e-4)


VELOCITIES: dict[str, tuple[dict[str, Any], float]] = {
    "average_T1": (AVERAGE, 1.0),
    "average_T0.5": ({"mode": "average", "temperature": {"name": "constant", "value": 0.5}}, 1.0),
    "argmax": (ARGMAX, 1.0),
    "average_T1_normalized": ({**AVERAGE, "renormalize": True}, 1.0),
    "cfg_w1.5_T1": (AVERAGE, 1.5),
}


def _guidance(scale: float) -> list[Guidance]:
    found = registry().create("guidance", {"name": "classifier_free", "scale": scale})
    assert isinstance(found, Guidance)
    return [found]


@pytest.mark.parametrize("name", VELOCITIES)
def test_golden_velocities(case: Case, name: str) -> None:
    wanted = case.io.get(f"velocity.{name}")
    if wanted is None:
        assert case.classes is None
        return
    estimate, scale = VELOCITIES[name]
    with torch.no_grad():
        problem = case.problem(_last(case), case.context(), estimate, _guidance(scale))
        for t, velocity in zip(case.io["velocity.t"], wanted, strict=True):
            _close(problem.velocity(case.io["cached.x"].double(), float(t)), velocity, 1e-3)


def test_golden_edm_velocity(case: Case) -> None:
    edm = registry().create("schedule", {"name": "linear", "velocity_scaling": "edm"})
    plain, case.lm.schedule = case.lm.schedule, edm
    try:
        with torch.no_grad():
            problem = case.problem(_last(case), case.context(), AVERAGE, [])
            for t, wanted in zip(case.io["velocity.t"], case.io["velocity.average_T1_edm"], strict=True):
                # The extra factor 1 / (1 - t) of this option multiplies float32 rounding as well.
                _close(problem.velocity(case.io["cached.x"].double(), float(t)), wanted, 1e-3 / (1 - float(t)))
    finally:
        case.lm.schedule = plain


def _annealed(power: float, end: float) -> dict[str, Any]:
    return {"mode": "average", "temperature": {"name": "polynomial", "power": power, "end": end}}


TRAJECTORIES: dict[str, tuple[str, dict[str, Any], float]] = {
    "midpoint8": ("midpoint", AVERAGE, 1.0),
    "midpoint8_anneal": ("midpoint", _annealed(1.0, 1.0), 1.0),
    "midpoint8_anneal_p2_end0.8": ("midpoint", _annealed(2.0, 0.8), 1.0),
    "midpoint8_argmax": ("midpoint", ARGMAX, 1.0),
    "euler15": ("euler", AVERAGE, 1.0),
    "heun2_5": ("heun", AVERAGE, 1.0),
    "rk4_5": ("rk4", AVERAGE, 1.0),
    "cfg_w0.0": ("midpoint", AVERAGE, 0.0),
    "cfg_w1.0": ("midpoint", AVERAGE, 1.0),
    "cfg_w1.5": ("midpoint", AVERAGE, 1.5),
    "cfg_w2.0": ("midpoint", AVERAGE, 2.0),
    "cfg_null": ("midpoint", AVERAGE, 1.0),
}


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_golden_trajectories(case: Case, name: str) -> None:
    io, (how, estimate, scale) = case.io, TRAJECTORIES[name]
    if f"trajectory.{name}.states" not in io:
        assert case.classes is None
        assert name.startswith("cfg")
        return
    grid = io[f"trajectory.{name}.grid"].tolist()
    with torch.no_grad():
        problem = case.problem(
            _last(case), case.context(), estimate, _guidance(scale), classes=not name.endswith("null")
        )
        found = states(problem, solver(how), io["trajectory.x0"], grid)
        # Rounding is multiplied by up to 1 / (1 - t): 14 for midpoint8's last slope, 64 where the end is evaluated.
        # Against float64 the golden logits of one such case are themselves off by 1.8e-3.
        factor = 64 / 14 if solver(how).evaluates_end else 1
        _close(found[:, :, 0], io[f"trajectory.{name}.states"], factor * 1e-4)
        _close(problem.read_out(found[-1], grid[-1]).values[:, 0], io[f"trajectory.{name}.final_logits"], factor * 1e-3)
        assert int(problem.evaluations[0, 0]) == solver(how).stages * (len(grid) - 1) + 1


class Replay(Guidance):
    """Moves towards tokens that were drawn elsewhere."""

    name: Literal["replay"] = "replay"
    _choices: list[Tensor] = PrivateAttr(default_factory=list)

    def __call__(self, predict: Predict, query: Query, space: Space) -> Prediction:
        logits = predict(query).logits
        return Prediction(logits, space.encode(self._choices.pop(0)[:, None]) if self._choices else None)


def test_golden_sampled_trajectory_replayed(case: Case) -> None:
    io = case.io
    replay = Replay()
    replay._choices.extend(io["trajectory.sampled.choices"])
    grid = io["trajectory.sampled.grid"].tolist()
    with torch.no_grad():
        problem = case.problem(_last(case), case.context(), AVERAGE, [replay], classes=False)
        found = states(problem, solver("midpoint"), io["trajectory.x0"], grid)
        _close(found[:, :, 0], io["trajectory.sampled.states"], 1e-4)
        _close(problem.read_out(found[-1], grid[-1]).values[:, 0], io["trajectory.sampled.final_logits"], 1e-3)


def test_golden_all_positions_at_once(case: Case) -> None:
    io, name = case.io, "trajectory.midpoint4_full_sequence"
    grid = io[f"{name}.grid"].tolist()
    with torch.no_grad():
        problem = case.problem(_everywhere(case), case.context(), AVERAGE, [])
        found = states(problem, solver("midpoint"), io["trajectory.x0_sequence"], grid)
        _close(found, io[f"{name}.states"], 1e-4)
        _close(problem.read_out(found[-1], grid[-1]).values, io[f"{name}.final_logits"], 1e-3)


ADAPTIVE = ["fehlberg2_adaptive", "fehlberg2_adaptive_grid8", "bosh3_adaptive"]


def _solve_adaptive(case: Case, how: Solver, grid: list[float]) -> Tensor:
    with torch.no_grad():
        problem = case.problem(_last(case), case.context(), AVERAGE, [])
        return how.solve(problem, case.io["trajectory.x0"].double(), grid)[:, 0]


@pytest.mark.parametrize("name", ADAPTIVE)
def test_golden_adaptive_trajectories_of_torchdiffeq(case: Case, name: str) -> None:
    key = f"trajectory.{name}"
    if f"{key}.states" not in case.io:
        assert case.facts["family"] != "llama"
        return
    how = solver("torchdiffeq_adaptive", method=name.split("_")[0], rtol=3e-4, atol=3e-4)
    found = _solve_adaptive(case, how, case.io[f"{key}.grid"].tolist())
    _close(found, case.io[f"{key}.states"][-1], 1e-2)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_golden_adaptive_per_row_is_within_four_times_the_authors_error(case: Case, name: str) -> None:
    key = f"trajectory.{name}"
    if f"{key}.states" not in case.io:
        assert case.facts["family"] != "llama"
        return
    grid = case.io[f"{key}.grid"].tolist()
    found = _solve_adaptive(case, solver(name.split("_")[0], rtol=3e-4, atol=3e-4), grid)
    exact = _solve_adaptive(case, solver("bosh3", rtol=1e-6, atol=1e-6, max_evaluations=5000), [grid[0], grid[-1]])
    theirs = (case.io[f"{key}.states"][-1] - exact).abs().max()
    assert (found - exact).abs().max() <= max(1e-2, 4 * float(theirs))


@pytest.mark.parametrize(("name", "estimate"), [("T1avg", AVERAGE), ("argmax", ARGMAX)])
def test_golden_six_token_decode(case: Case, name: Literal["T1avg", "argmax"], estimate: dict[str, Any]) -> None:
    io, lm = case.io, case.lm
    context, length = case.context(), io["input_ids"].shape[1]
    grid = lm.schedule.grid(8, 1.0)
    with torch.no_grad():
        for step, noise in enumerate(io["decode.noise"]):
            problem = case.problem(torch.full((len(noise), 1), length - 1 + step), context, estimate, [])
            logits = problem.read_out(solver("midpoint").solve(problem, noise.double(), grid), grid[-1]).values
            _close(logits[:, 0], io[f"decode.{name}.logits"][:, step], 1.5e-3)
            tokens = logits.argmax(-1)
            assert torch.equal(tokens[:, 0], io[f"decode.{name}.tokens"][:, step])
            context = lm.backbone.extend(context, tokens)


def test_golden_functions(golden_dir: Path) -> None:
    path = golden_dir / "l2d" / "functions.safetensors"
    if not path.is_file():
        pytest.skip("this golden folder has no functions")
    values = load_file(path)
    cosmap = registry().create("schedule", {"name": "linear", "times": "cosmap"})
    _close(cosmap.sample_times(values["cosmap.u"]), values["cosmap.t"], 1e-6)
    for key in (key for key in values if key.startswith("temperature.p")):
        power, end = key.removeprefix("temperature.p").split("_end")
        options = {"name": "polynomial", "power": float(power), "end": float(end)}
        space = registry().create("parametrization", {"name": "embedding", "estimate": {"temperature": options}})
        _close(space.estimate.temperature(values["temperature.t"]), values[key], 1e-9)
    from l2d_plugins.backbones.conditioning import sinusoid

    for size in (256, 32):
        _close(sinusoid(values["sinusoid.t"], size), values[f"sinusoid.dim{size}"], 1e-6)
