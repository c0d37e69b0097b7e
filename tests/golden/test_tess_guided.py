"""The authors' reward network guides the authors' weights as it did in their code."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import shared_folders
import torch
from golden_device import read
from golden_tess import Case, replay, slots, take
from torch import Tensor
from transformers import MistralConfig, MistralForSequenceClassification

from l2d_framework.diffusion.logits import dense
from l2d_framework.guidance import Guidance
from l2d_framework.types import Layout, Predict, Prediction, Query, Space
from l2d_plugins.guidance.reward_gradient import RewardGradient
from l2d_plugins.solvers.renoise import Renoise


def _folders() -> list[Path]:
    found = shared_folders.find("L2D_GOLDEN_DIR", "golden")
    return [] if found is None else sorted(path.parent for path in (found / "tess").glob("*/reward_state.safetensors"))


@pytest.fixture(scope="module", params=_folders() or [None], ids=lambda folder: folder.name if folder else "none")
def case(request: pytest.FixtureRequest, golden_dir: Path) -> Case:
    if request.param is None:
        pytest.skip(f"no rewards in {golden_dir / 'tess'}")
    return Case.read(request.param)


@pytest.fixture(scope="module")
def reward(case: Case, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The reward network as a transformers folder."""
    model = MistralForSequenceClassification(MistralConfig(**case.meta["reward_config"], num_labels=1))
    model.load_state_dict(read(case.folder / "reward_state.safetensors"))
    folder = tmp_path_factory.mktemp("reward")
    model.save_pretrained(folder)
    return str(folder)


class _Recording:
    """Space of one evaluation of a layout."""

    evaluation = 0

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.recorded: dict[str, Tensor] = {}

    def record(self, name: str, values: Tensor) -> None:
        self.recorded[name] = values


class _Watch(Guidance):
    """Keeps the logits that pass through it."""

    name: Literal["watch"] = "watch"
    seen: Any

    def __call__(self, predict: Predict, query: Query, space: Space) -> Prediction:
        prediction = predict(query)
        self.seen.append(prediction.logits)
        return prediction


def _guided(guidance: RewardGradient, layout: Layout, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, S, V) after guidance at the denoised slots, and the reward before."""
    positions, _ = slots(layout)
    asked = Query(torch.zeros(*positions.shape, 1), torch.zeros(positions.shape), positions, None)
    space: Any = _Recording(layout)
    answer = guidance(lambda query: Prediction(take(logits, positions)), asked, space)  # type: ignore[arg-type]
    out = logits.clone()
    out[torch.arange(len(logits))[:, None], positions] = answer.logits
    return out, space.recorded["reward"]


def test_golden_reward_of_tokens(case: Case, reward: str) -> None:
    layout = case.layout()
    certain = torch.zeros(*layout.tokens.shape, case.meta["config"]["vocab_size"])
    certain.scatter_(-1, layout.tokens[..., None], 1e4)
    _, found = _guided(RewardGradient(model=reward), layout, certain)
    torch.testing.assert_close(found, case.io["reward.hard_reward_last_position"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_golden_reward_gradients(case: Case, reward: str, temperature: float) -> None:
    logits, layout = case.io["forward.previous_pred"], case.layout()
    guidance = RewardGradient(model=reward, scale=1.0, temperature=temperature)
    guided, found = _guided(guidance, layout, logits)
    name = f"guidance.float32.tau{temperature}"
    torch.testing.assert_close(found, case.io[f"{name}.reward"], rtol=0, atol=1e-5)
    torch.testing.assert_close(guided - logits, case.io[f"{name}.grad"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_golden_reward_gradients_in_the_precision_of_the_authors(case: Case, reward: str, temperature: float) -> None:
    logits, layout = case.io["forward.previous_pred"], case.layout()
    guidance = RewardGradient(model=reward, scale=1.0, temperature=temperature, precision="bfloat16")
    guided, found = _guided(guidance, layout, logits)
    name = f"guidance.bfloat16.tau{temperature}"
    torch.testing.assert_close(found, case.io[f"{name}.reward"], rtol=0, atol=5e-2)
    moved, wanted = (guided - logits).flatten(1), case.io[f"{name}.grad"].flatten(1)
    assert (torch.cosine_similarity(moved, wanted) > 0.99).all()


@pytest.mark.parametrize(("steps", "tolerance"), [(1, 1e-3), (3, 5e-3)])
def test_golden_guided_process(case: Case, reward: str, steps: int, tolerance: float) -> None:
    io, model, layout = case.io, case.model(), case.layout("sample.input_ids", "sample.span_mask")
    raw: list[Tensor] = []
    guidance = RewardGradient(
        model=reward, scale=float(case.meta["guidance.coefficient"]), inner_steps=steps, accumulate_gradients=True
    )
    noises = [io["guided_sample.initial_standard_normal"]]
    noises += [io[f"guided_sample.step{i}.standard_normal"] for i in range(case.steps)]
    with torch.no_grad():
        seen, problem = replay(
            model, layout, noises=noises, steps=case.steps, solver=Renoise(), guidance=[_Watch(seen=raw), guidance]
        )
    positions, valid = slots(layout)
    assert len(seen) == len(raw) == case.steps == len(problem.metrics["reward"])
    name = f"guided_sample.float32.inner{steps}"
    for i, evaluation in enumerate(seen):
        for found, part in (
            (dense(evaluation.x), "simplex_in"),
            (raw[i], "raw_logits"),
            (evaluation.logits, "guided_logits"),
        ):
            wanted = take(io[f"{name}.step{i}.{part}"], positions)
            torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
    tokens = seen[-1].logits.argmax(-1)
    assert torch.equal(tokens[valid], take(io[f"{name}.final_ids"], positions)[valid])
