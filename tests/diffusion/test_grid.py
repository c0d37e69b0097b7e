"""Every combination of the installed components trains and generates, or is refused with the reason."""

import atexit
import re
import shutil
import tempfile
from functools import cache
from itertools import product

import pytest
import torch
from diffusion_models import NETWORK, SPACE, random_tokens
from pydantic import ValidationError
from tiny_models import tiny_lm, tiny_tokenizer
from transformers import LlamaForSequenceClassification

from l2d_framework.diffusion.loss import denoising_loss
from l2d_framework.diffusion.training_noise import NoiseRule, draw
from l2d_framework.errors import ConfigError
from l2d_framework.models.diffusion_lm import DiffusionLM, Origin
from l2d_framework.registry import registry
from l2d_framework.schedule import Schedule
from l2d_framework.types import Layout

VOCABULARY, PROMPT, NEW = 64, 4, 4
CLASSES = ("a", "b")
BLOCK_SIZES = (1, 2, None)

REWARD = tempfile.mkdtemp(prefix="l2d-grid-")
atexit.register(shutil.rmtree, REWARD, ignore_errors=True)

FIELDS = {
    ("backbone", "two_stream"): NETWORK,
    ("parametrization", "embedding"): SPACE,
    ("guidance", "reward_gradient"): {"model": REWARD},
}
"""Fields that keep a component small, or without which it cannot be made."""


def offered(kind):
    """Everything installed that can be made: by name, with a guess for nothing that a component requires."""
    found = {}
    for name, component in registry().components(kind).items():
        fields = dict(FIELDS.get((kind, name), {}))
        loose = {"rtol": 2.0, "atol": 2.0, "num_classes": len(CLASSES)}
        fields |= {field: value for field, value in loose.items() if field in component.model_fields}
        if component.missing_requirements():
            continue
        try:
            found[name] = component.model_validate(fields)
        except ValidationError:
            assert any(field.is_required() for field in component.model_fields.values()), name
    return found


SCHEDULES, SPACES, BACKBONES = offered("schedule"), offered("parametrization"), offered("backbone")
SOLVERS, GUIDANCE = offered("solver"), offered("guidance")

LM_CONFIG = tiny_lm(vocab_size=VOCABULARY).config


@pytest.fixture(scope="module", autouse=True)
def reward():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForSequenceClassification(LM_CONFIG.__class__(**{**LM_CONFIG.to_dict(), "num_labels": 1})).save_pretrained(
            REWARD
        )
    tiny_tokenizer().save_pretrained(REWARD)


def refusal(backbone, block_size):
    try:
        BACKBONES[backbone].check(LM_CONFIG, block_size)
    except ConfigError as error:
        return str(error)
    return None


ALL = list(product(SCHEDULES, SPACES, BACKBONES, BLOCK_SIZES))
# Noise of a schedule that learns is that of its base, so every block size meets the base alone.
LEARNED = [name for name, config in SCHEDULES.items() if not isinstance(config, Schedule)]
SERVED = [parts for parts in ALL if refusal(*parts[2:]) is None and (parts[0] not in LEARNED or parts[3] in (1, None))]
REFUSED = sorted({parts[2:] for parts in ALL} - {parts[2:] for parts in SERVED}, key=str)


def built(schedule, space, backbone, block_size, **fields):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = type(BACKBONES[backbone]).model_validate({**BACKBONES[backbone].model_dump(), **fields})
        network = network.build(tiny_lm(vocab_size=VOCABULARY))
        states = SPACES[space].build(network.vocab_size, network.hidden_size)
    model = DiffusionLM(SCHEDULES[schedule].build(), states, network, block_size)
    model.origin = Origin(classes=CLASSES[: network.config.num_classes])
    return model


def batch(block_size):
    """Three texts to learn after a prompt, block by block."""
    tokens = random_tokens(3, PROMPT + 6) % VOCABULARY
    place = torch.arange(PROMPT + 6) - PROMPT
    blocks = torch.where(place < 0, 0, 1 if block_size is None else 1 + place // block_size)
    return Layout(tokens, blocks.expand_as(tokens))


@cache
def trained(*parts):
    """The model of a combination after two steps, with its loss before, between and after them."""
    model, layout = built(*parts), batch(parts[-1])
    rule = NoiseRule([(0, 0, row) for row in range(3)], class_dropout=0.3, self_conditioning=0.5)
    weights = list(model.own_parameters().values())
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    losses = []
    for _ in range(3):
        found = denoising_loss(model, layout, draw(model, layout, rule), classes=torch.tensor([0, 1, -1]))
        losses.append(found.total.item() / found.count)
        optimizer.zero_grad()
        found.total.backward()
        assert all(weight.grad is None or weight.grad.isfinite().all() for weight in weights)
        if len(losses) < 3:
            optimizer.step()
    return model.eval(), losses


def steps(solver):
    """The least number of evaluations above three that a solver can make; its own choice if it is adaptive."""
    if SOLVERS[solver].is_adaptive:
        return None
    for count in range(4, 20):
        try:
            SOLVERS[solver].grid_size(count)
        except ConfigError:
            continue
        return count
    raise AssertionError(f"{solver} makes none of 4 to 19 evaluations")


def generated(model, solver, **options):
    prompts = random_tokens(2, PROMPT) % VOCABULARY
    chosen = {"solver": SOLVERS[solver], "num_inference_steps": steps(solver), "guidance": [], "estimate": {}}
    return model.generate(prompts, **{"max_new_tokens": NEW, "eos_token_id": None, **chosen, **options})


def named(parts):
    return "-".join(map(str, parts))


combinations = pytest.mark.parametrize("parts", SERVED, ids=named)


def test_the_grid_holds_every_component_that_ships_with_the_project():
    assert {"cosine", "linear"} <= set(SCHEDULES)
    assert {"embedding", "simplex"} <= set(SPACES)
    assert {"in_place", "two_stream"} <= set(BACKBONES)
    assert {"euler", "midpoint", "heun", "rk4", "fehlberg2", "bosh3", "renoise"} <= set(SOLVERS)
    assert {"classifier_free"} <= set(GUIDANCE)
    for name in BACKBONES:
        assert any(parts[2] == name for parts in SERVED)


@combinations
def test_two_steps_of_training_lower_the_loss(parts):
    _, losses = trained(*parts)
    assert losses[2] < losses[0]


GUIDED = [None, *GUIDANCE]
# Every combination meets every solver and every guidance, and every solver every guidance; not all three each other.
MEETINGS = [
    (parts, solver, GUIDED[(i + j) % len(GUIDED)]) for i, parts in enumerate(SERVED) for j, solver in enumerate(SOLVERS)
]


@pytest.mark.parametrize(
    ("parts", "solver", "guidance"),
    MEETINGS,
    ids=lambda value: named(value) if isinstance(value, tuple) else str(value),
)
def test_it_generates(parts, solver, guidance):
    model, _ = trained(*parts)
    options = {}
    if guidance is not None:
        options["guidance"] = [GUIDANCE[guidance].model_copy(update={"scale": 1.7})]
    if guidance is not None and GUIDANCE[guidance].needs_classes:
        options["classes"] = ["a", "b"]
    found = generated(model, solver, **options)
    assert found.answers.shape == (2, NEW)
    assert ((found.answers >= 0) & (found.answers < VOCABULARY)).all()
    if steps(solver) is None:
        assert (found.evaluations >= 2).all()
    else:
        assert (found.evaluations == steps(solver)).all()


@pytest.mark.parametrize("solver", [name for name, solver in SOLVERS.items() if not solver.is_adaptive])
@pytest.mark.parametrize("parts", [parts for parts in SERVED if parts[-1] is None], ids=named)
def test_an_answer_grows_block_by_block(parts, solver):
    model, blocks = trained(*parts)[0], []
    found = generated(model, solver, block_size=2, observer=lambda e: blocks.append(e.positions[0].tolist()))
    assert found.answers.shape == (2, NEW)
    start = list(range(PROMPT, PROMPT + NEW))
    assert blocks == [start[:2]] * steps(solver) + [start[2:]] * steps(solver)


@pytest.mark.parametrize(("backbone", "block_size"), REFUSED)
def test_a_block_size_that_a_backbone_cannot_serve_is_refused(backbone, block_size):
    asked = "null|None" if block_size is None else str(block_size)
    assert re.search(rf"'{backbone}'.*block_size.*\b({asked})\b", refusal(backbone, block_size))


@pytest.mark.parametrize("parts", [parts for parts in SERVED if parts[-1] is not None], ids=named)
def test_an_answer_in_blocks_that_the_network_never_learnt_is_refused(parts):
    for size in (1, 2, 3):
        if refusal(parts[2], size):
            with pytest.raises(ConfigError, match=f"block_size={size}"):
                generated(trained(*parts)[0], next(iter(SOLVERS)), block_size=size)


@pytest.mark.parametrize("guidance", [name for name, guidance in GUIDANCE.items() if guidance.needs_classes])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_guidance_towards_a_class_is_refused_without_one(backbone, guidance):
    parts = next(parts for parts in SERVED if parts[2] == backbone)
    solver = next(iter(SOLVERS))
    wanted = GUIDANCE[guidance].model_copy(update={"scale": 1.7})
    with pytest.raises(ConfigError, match=f"'{guidance}' with scale 1.7 .* the requests name none"):
        generated(trained(*parts)[0], solver, guidance=[wanted])
    with pytest.raises(ConfigError, match=f"'{guidance}' with scale 1.7 needs a model trained with class labels"):
        generated(built(*parts, num_classes=0), solver, guidance=[wanted])


@pytest.mark.parametrize("guidance", [name for name, guidance in GUIDANCE.items() if guidance.sets_clean])
def test_guidance_that_decides_where_to_move_is_refused_inside_another(guidance):
    twice = [GUIDANCE[guidance].model_copy(update={"scale": 1.7})] * 2
    with pytest.raises(ConfigError, match=f"'{guidance}' decides what the solver moves towards"):
        generated(trained(*SERVED[0])[0], next(iter(SOLVERS)), guidance=twice, classes=["a", "b"])


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_a_solver_cannot_do_is_refused(solver):
    model, refused = trained(*SERVED[0])[0], {}
    if SOLVERS[solver].is_adaptive:
        refused["patience=1 counts evaluations on a fixed grid"] = {"patience": 1}
        refused["num_inference_steps=1"] = {"num_inference_steps": 1}
    else:
        refused["needs a number, got None"] = {"num_inference_steps": None}
    if SOLVERS[solver].evaluates_end:
        refused["velocity at the end time, which is singular at 1"] = {"end_time": 1.0}
    if SOLVERS[solver].stages > 1:
        refused["cannot use num_inference_steps=2|got num_inference_steps=2"] = {"num_inference_steps": 2}
    for reason, options in refused.items():
        with pytest.raises(ConfigError, match=f"(?s){reason}") as error:
            generated(model, solver, **options)
        assert solver in str(error.value)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_no_evaluations_at_all_are_refused_where_there_is_no_plain_language_model(backbone):
    parts = next(parts for parts in SERVED if parts[2] == backbone)
    model = trained(*parts)[0]
    if model.backbone.identity_at_zero:
        assert not generated(model, "euler", num_inference_steps=0).evaluations.any()
    else:
        with pytest.raises(ConfigError, match="num_inference_steps=0 means the plain language model"):
            generated(model, "euler", num_inference_steps=0)
