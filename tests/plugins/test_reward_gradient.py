"""Reward guidance ascends the reward, row by row, and refuses reward models that speak of other tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from companion_models import Weights, longer, refuse_weights, swapped, without_tokenizer
from diffusion_models import random_tokens, shared_tess
from pydantic import ValidationError
from tiny_models import FAMILIES, SIZES, tiny_tokenizer
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification, BertConfig, PreTrainedModel

from l2d_framework.diffusion.rng import TokenStreams
from l2d_framework.errors import CheckpointError, ConfigError, L2DError, UnsupportedModelError
from l2d_framework.testing import checks_for
from l2d_framework.types import Layout, Prediction, Query
from l2d_plugins.guidance import reward_network
from l2d_plugins.guidance.classifier_free import ClassifierFree
from l2d_plugins.guidance.reward_gradient import RewardGradient

V, EOS = SIZES["vocab_size"], SIZES["eos_token_id"]
B, KNOWN, L = 3, 5, 4
"""Rows, known tokens, then positions asked about."""


def classifier(family: str = "llama", **overrides: Any) -> PreTrainedModel:
    """Random reward model in which every layer matters."""
    options = {**SIZES, **FAMILIES.get(family, {}), "num_labels": 1, **overrides}
    attention = options.pop("attn_implementation", "sdpa")
    config = CONFIG_MAPPING[family](**options)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            width = parameter.shape[-1] if parameter.shape[0] != options["vocab_size"] else 1
            parameter.copy_(noise * width**-0.5) if parameter.ndim >= 2 else parameter.add_(0.1 * noise)
    return model.eval()


def write(folder: Path, model: PreTrainedModel, *, tokenizer: bool = True) -> str:
    model.save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("reward"), classifier())


class Space:
    """One evaluation."""

    def __init__(self, layout: Layout, positions: Tensor, *, evaluation: int = 0, rows: Any = None) -> None:
        self.layout, self.evaluation, self.recorded = layout, evaluation, {}
        rows = range(len(positions)) if rows is None else rows
        self._streams = TokenStreams([[(r, i) for i in range(positions.shape[1])] for r in rows], torch.device("cpu"))

    def record(self, name: str, values: Tensor) -> None:
        assert name not in self.recorded
        self.recorded[name] = values

    def random(self) -> TokenStreams:
        return self._streams


def layout(padding: tuple[int, ...] = (0,) * B, *, seed: int = 0) -> Layout:
    tokens = random_tokens(len(padding), KNOWN, seed=seed)
    return Layout(tokens, (torch.arange(KNOWN) >= torch.tensor(padding)[:, None]).long() - 1)


def positions(rows: int = B) -> Tensor:
    return torch.arange(KNOWN, KNOWN + L).expand(rows, -1)


def random_logits(rows: int = B, *, length: int = L, seed: int = 1) -> Tensor:
    return 3 * torch.randn(rows, length, V, generator=torch.Generator().manual_seed(seed))


def certain(tokens: Tensor) -> Tensor:
    return torch.zeros(*tokens.shape, V).scatter(-1, tokens[..., None], 1e4)


def guide(
    guidance: RewardGradient,
    logits: Tensor,
    known: Layout | None = None,
    slots: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    **space: Any,
) -> tuple[Tensor, Tensor | None]:
    """Guided logits and recorded reward."""
    slots = positions(len(logits)) if slots is None else slots
    known = layout((0,) * len(logits)) if known is None else known
    query = Query(torch.zeros(*slots.shape, 1), torch.zeros(slots.shape), slots, None, guidance_scale=scales)
    scene: Any = Space(known, slots, **space)

    def predict(query: Query) -> Prediction:
        assert not torch.is_grad_enabled()
        return Prediction(logits)

    answer = guidance(predict, query, scene)  # type: ignore[arg-type]
    assert answer.clean is None
    return answer.logits, scene.recorded.get("reward")


def rewards_of(folder: str, tokens: Tensor) -> Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        return torch.stack([model(row[None]).logits[0, 0] for row in tokens])


def test_at_scale_zero_nothing_is_changed_nor_loaded() -> None:
    logits = random_logits()
    guided, reward = guide(RewardGradient(model="/nowhere", scale=0.0), logits)
    assert guided is logits
    assert reward is None


def test_rows_that_ask_for_scale_zero_keep_every_bit(reward: str) -> None:
    logits, scales = random_logits(), torch.tensor([0.0, 2.0, 0.0])[:, None].expand(-1, L)
    guided, _ = guide(RewardGradient(model=reward), logits, scales=scales)
    strong, _ = guide(RewardGradient(model=reward, scale=2.0), logits)
    assert torch.equal(guided[[0, 2]], logits[[0, 2]])
    assert not torch.equal(guided[1], logits[1])
    torch.testing.assert_close(guided[1], strong[1])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gemma2", "gemma3_text"])
def test_the_reward_of_certain_tokens_is_what_transformers_says(family: str, tmp_path: Path) -> None:
    folder, known = write(tmp_path, classifier(family)), layout((0, 2, 1))
    tokens = random_tokens(B, L, seed=3)
    _, found = guide(RewardGradient(model=folder), certain(tokens), known)
    whole = torch.cat([known.tokens, tokens], 1)
    wanted = [rewards_of(folder, row[None, skip:]) for row, skip in zip(whole, (0, 2, 1), strict=True)]
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-4, atol=1e-4)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"position": "expected_end"},
    {"gumbel": "soft", "temperature": 2.0},
    {"gumbel": "soft", "position": "expected_end"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_the_logits_move_along_the_slope_of_the_reward(reward: str, options: dict[str, Any]) -> None:
    guidance, logits, known = RewardGradient(model=reward, scale=1.0, **options), random_logits(), layout((0, 2, 1))
    logits[..., EOS] += 4
    moved = (guide(guidance, logits, known)[0] - logits).double()
    step = 0.02
    for seed in range(3):
        way = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
        if seed == 0:
            way = (moved / moved.norm(dim=(1, 2), keepdim=True)).float()
        ahead, behind = (guide(guidance, logits + sign * step * way, known)[1] for sign in (1, -1))
        assert ahead is not None and behind is not None
        slope = (ahead - behind).double() / (2 * step)
        torch.testing.assert_close((moved * way).sum((1, 2)), slope, rtol=0.02, atol=2e-3)
        assert seed or (slope > 0).all()


def test_a_step_raises_the_reward(reward: str) -> None:
    logits = random_logits()
    guided, before = guide(RewardGradient(model=reward, scale=0.3), logits)
    _, after = guide(RewardGradient(model=reward, scale=0.3), guided)
    assert before is not None and after is not None
    assert (after > before).all()


@pytest.mark.parametrize("options", [*VARIANTS, {"gumbel": "hard"}, {"max_gradient_norm": 1e-3}], ids=str)
def test_a_row_is_guided_alike_alone_and_beside_longer_ones(reward: str, options: dict[str, Any]) -> None:
    guidance, logits, known = RewardGradient(model=reward, **options), random_logits(), layout((0, 3, 1))
    together, rewards = guide(guidance, logits, known)
    assert rewards is not None
    for row, skip in enumerate((0, 3, 1)):
        alone = Layout(known.tokens[row : row + 1, skip:], known.blocks[row : row + 1, skip:])
        guided, value = guide(guidance, logits[row : row + 1], alone, positions(1) - skip, rows=[row])
        torch.testing.assert_close(together[row : row + 1], guided, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rewards[row : row + 1], value, rtol=1e-5, atol=1e-5)


def test_what_stands_in_padding_and_at_gaps_is_not_read(reward: str) -> None:
    known, slots = layout((2, 0, 1)), torch.tensor([[2, 3], [1, 4], [2, 4]])
    guidance, logits = RewardGradient(model=reward), random_logits(length=2)
    guided, _ = guide(guidance, logits, known, slots)
    hidden = (known.blocks < 0).scatter(1, slots, True)
    other = Layout(torch.where(hidden, (known.tokens + 9) % V, known.tokens), known.blocks)
    assert torch.equal(guide(guidance, logits, other, slots)[0], guided)
    later = known.tokens.clone()
    later[1, 3] += 1
    assert not torch.equal(guide(guidance, logits, Layout(later, known.blocks), slots)[0][1], guided[1])


def test_gaps_are_filled_where_they_stand(reward: str) -> None:
    known, slots = layout(), torch.tensor([[2, 3], [1, 4], [2, 4]])
    tokens = random_tokens(B, 2, seed=3)
    _, found = guide(RewardGradient(model=reward), certain(tokens), known, slots)
    torch.testing.assert_close(found, rewards_of(reward, known.tokens.scatter(1, slots, tokens)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"max_gradient_norm": 0.1}, {"inner_steps": 2}], ids=str)
def test_positions_repeated_to_fill_up_a_row_change_nothing(reward: str, options: dict[str, Any]) -> None:
    guidance, logits = RewardGradient(model=reward, scale=1.0, **options), random_logits()
    logits[0, 2:] = logits[0, 1:2]
    slots = positions().clone()
    slots[0, 2:] = slots[0, 1]
    guided, reward_ = guide(guidance, logits, None, slots)
    alone, value = guide(guidance, logits[:1, :2], Layout(layout().tokens[:1], layout().blocks[:1]), slots[:1, :2])
    assert reward_ is not None
    torch.testing.assert_close(reward_[:1], value)
    torch.testing.assert_close(guided[:1, :2], alone)
    torch.testing.assert_close(guided[:1, 2:], alone[:, 1:].expand(-1, L - 2, -1))


def test_of_different_logits_about_one_slot_the_last_count(reward: str) -> None:
    guidance, logits = RewardGradient(model=reward, scale=1.0), random_logits()
    slots = positions().clone()
    slots[:, 2:] = slots[:, 1:2]
    moved = guide(guidance, logits, None, slots)[0] - logits
    alone = guide(guidance, logits[:, [0, 3]], None, slots[:, :2])[0] - logits[:, [0, 3]]
    torch.testing.assert_close(moved, alone[:, [0, 1, 1, 1]], rtol=1e-4, atol=1e-5)


def test_every_second_evaluation_is_left_alone(reward: str) -> None:
    logits = random_logits()
    for evaluation in range(4):
        guided, value = guide(RewardGradient(model=reward, every=2), logits, evaluation=evaluation)
        assert (guided is logits) == (value is None) == bool(evaluation % 2)


def test_gradients_are_cleared_between_inner_steps_unless_they_are_to_accumulate(reward: str) -> None:
    logits, options = random_logits(), {"model": reward, "scale": 0.5}
    once = guide(RewardGradient(**options), logits)[0]
    twice = guide(RewardGradient(**options), once)[0]
    cleared = guide(RewardGradient(**options, inner_steps=2), logits)[0]
    summed = guide(RewardGradient(**options, inner_steps=2, accumulate_gradients=True), logits)[0]
    torch.testing.assert_close(cleared, twice)
    torch.testing.assert_close(summed, twice + (once - logits), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(summed, cleared, atol=1e-3)
    assert torch.equal(guide(RewardGradient(**options, accumulate_gradients=True), logits)[0], once)


def test_the_expected_end_is_the_canvas_end_where_no_end_token_can_stand(reward: str) -> None:
    logits = random_logits()
    logits[..., EOS] = -1e4
    ends = [guide(RewardGradient(model=reward, position=p), logits) for p in ("canvas_end", "expected_end")]
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_the_expected_end_is_the_first_end_token_where_it_is_certain(reward: str) -> None:
    tokens, known = random_tokens(B, L, seed=3), layout()
    for row, place in enumerate((0, 2, 3)):
        tokens[row, place] = EOS
    tokens[1, 3] = EOS
    known.tokens[:, 2] = EOS  # an end before the answer ends no answer
    _, found = guide(RewardGradient(model=reward, position="expected_end"), certain(tokens), known)
    whole = torch.cat([known.tokens, tokens], 1)
    wanted = [rewards_of(reward, whole[row, : KNOWN + place + 1][None]) for row, place in enumerate((0, 2, 3))]
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-4, atol=1e-4)


def test_the_expected_end_weighs_every_place_with_the_chance_that_the_answer_ends_there(reward: str) -> None:
    chance, word = 0.3, 40
    logits = torch.full((1, 2, V), -1e4)
    logits[..., EOS], logits[..., word] = torch.tensor([chance, 1 - chance]).log()
    guidance = RewardGradient(model=reward, position="expected_end", gumbel="hard")
    known = layout((0,))
    # Averaged over hard draws, every one of which is read at its own first end.
    draws = torch.cat([guide(guidance, logits, known, positions(1)[:, :2], rows=[r])[1] for r in range(300)])  # type: ignore[misc]
    first, *_ = known.tokens
    texts = [[EOS], [word, EOS], [word, word]]
    values = torch.stack([rewards_of(reward, torch.cat([first, torch.tensor(text)])[None])[0] for text in texts])
    shares = torch.stack([((draws - value).abs() < 1e-4).float().mean() for value in values])
    torch.testing.assert_close(shares, torch.tensor([chance, 0.7 * chance, 0.49]), rtol=0, atol=0.09)
    assert float(shares.sum()) == pytest.approx(1)


def test_a_known_end_after_a_gap_ends_the_answer(reward: str) -> None:
    known, slots = layout(), torch.tensor([[1]]).expand(B, -1)
    known.tokens[:, 3] = EOS
    tokens = random_tokens(B, 1, seed=3)
    _, found = guide(RewardGradient(model=reward, position="expected_end"), certain(tokens), known, slots)
    wanted = rewards_of(reward, known.tokens.scatter(1, slots, tokens)[:, :4])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_long_gradient_is_shortened_row_by_row_and_a_short_one_is_not(reward: str) -> None:
    logits = random_logits()
    free = guide(RewardGradient(model=reward, scale=1.0), logits)[0] - logits
    norms = free.norm(dim=(1, 2))
    limit = float(norms.median())
    moved = guide(RewardGradient(model=reward, scale=1.0, max_gradient_norm=limit), logits)[0] - logits
    wanted = free * (limit / norms).clamp(max=1)[:, None, None]
    torch.testing.assert_close(moved, wanted, rtol=1e-3, atol=1e-6)
    assert (norms > limit).any() and (norms < limit).any()


def test_gumbel_noise_is_keyed_and_leaves_the_global_generator(reward: str) -> None:
    logits, before = random_logits(), torch.get_rng_state()
    noisy = RewardGradient(model=reward, gumbel="soft")
    first, again = guide(noisy, logits)[0], guide(noisy, logits)[0]
    other = guide(noisy, logits, rows=[7, 8, 9])[0]
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), before)


def test_hard_gumbel_reads_the_tokens_that_soft_gumbel_nears_when_cold(reward: str) -> None:
    logits = random_logits()
    hard = guide(RewardGradient(model=reward, gumbel="hard"), logits)[1]
    cold = guide(RewardGradient(model=reward, gumbel="soft", temperature=1e-3), logits)[1]
    torch.testing.assert_close(hard, cold, rtol=1e-4, atol=1e-4)


def test_many_positions_in_chunks_are_guided_as_at_once(reward: str, monkeypatch: pytest.MonkeyPatch) -> None:
    guidance, logits = RewardGradient(model=reward, gumbel="soft", position="expected_end"), random_logits()
    whole = guide(guidance, logits)[0]
    monkeypatch.setattr("l2d_framework.diffusion.logits.CHUNK", 2 * B * V)
    torch.testing.assert_close(guide(guidance, logits)[0], whole, rtol=1e-6, atol=1e-6)


def test_it_guides_where_autograd_was_switched_off_for_good(reward: str) -> None:
    logits = random_logits()
    with torch.inference_mode():
        inside = guide(RewardGradient(model=reward), logits.clone())[0]
    torch.testing.assert_close(inside, guide(RewardGradient(model=reward), logits)[0])


def test_half_precision_points_the_same_way(reward: str) -> None:
    logits = random_logits()
    ways = [guide(RewardGradient(model=reward, precision=p), logits)[0] - logits for p in ("float32", "bfloat16")]
    assert (torch.cosine_similarity(*(way.flatten(1) for way in ways)) > 0.98).all()
    assert not torch.equal(*ways)


@pytest.mark.parametrize("options", [*VARIANTS, {"gumbel": "hard"}, {"inner_steps": 2}], ids=str)
def test_it_obeys_the_laws_of_guidance(options: dict[str, Any], tmp_path: Path) -> None:
    folder = write(tmp_path, classifier(vocab_size=11), tokenizer=False)
    for check in checks_for(RewardGradient(model=folder, **options)):
        check(RewardGradient(model=folder, **options))


def test_a_reward_model_is_loaded_once_until_its_folder_is_written_again(tmp_path: Path) -> None:
    folder, logits = write(tmp_path, classifier()), random_logits()
    loaded = reward_network._load.cache_info().misses
    first = [guide(RewardGradient(model=folder, scale=s), logits)[1] for s in (1.0, 2.0)]
    assert reward_network._load.cache_info().misses == loaded + 1
    model = classifier()
    with torch.no_grad():
        model.score.weight.neg_()
    write(tmp_path, model)
    _, second = guide(RewardGradient(model=folder), logits)
    assert second is not None and first[0] is not None
    torch.testing.assert_close(second, -first[0])


def test_the_reward_model_stays_frozen(reward: str) -> None:
    network = reward_network.load_reward_model(reward, torch.device("cpu"), torch.float32)
    assert not network.body.training
    assert not any(p.requires_grad for p in [*network.body.parameters(), *network.score.parameters()])


# Generation


PROMPTS = ["ab", "a longer one"]


def answers(**options: Any) -> Any:
    model = shared_tess(tokenizer=True)
    return model.generate(options.pop("prompts", PROMPTS), max_new_tokens=6, eos_token_id=-1, **options)


def test_generation_at_scale_zero_is_unguided(reward: str) -> None:
    plain, guided = answers(), answers(guidance=[RewardGradient(model=reward, scale=0.0)])
    assert torch.equal(plain.sequences, guided.sequences)
    assert not guided.metrics


def test_generation_returns_the_reward_of_every_evaluation(reward: str) -> None:
    for options, count in (({}, 4), ({"every": 2}, 2), ({"inner_steps": 3}, 4)):
        found = answers(guidance=[RewardGradient(model=reward, **options)]).metrics["reward"]
        assert found.shape == (len(PROMPTS), count)
        assert found.isfinite().all()


def test_answers_earn_more_the_stronger_the_guidance(tmp_path: Path) -> None:
    # A reward of the last token alone: of random layers, the slope at a mixture says little about its tokens.
    model = classifier()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
    folder, earned = write(tmp_path, model), []
    for scale in (0.0, 100.0, 1000.0):
        guidance = RewardGradient(model=folder, scale=scale, temperature=5.0)
        found = answers(prompts=[f"{number} to go" for number in range(6)], guidance=[guidance])
        earned.append(rewards_of(folder, found.answers).mean())
    assert earned[0] + 0.5 < earned[1] < earned[2] - 0.5


@pytest.mark.parametrize("options", [{}, {"gumbel": "soft"}], ids=str)
def test_an_answer_is_guided_alike_alone_and_beside_others(reward: str, options: dict[str, Any]) -> None:
    guidance = [RewardGradient(model=reward, scale=2.0, **options)]
    together = answers(guidance=guidance)
    for row, prompt in enumerate(PROMPTS):
        alone = answers(prompts=[prompt], guidance=guidance)
        assert torch.equal(alone.answers[0], together.answers[row])
        torch.testing.assert_close(alone.metrics["reward"][0], together.metrics["reward"][row], rtol=1e-4, atol=1e-4)


def test_it_composes_with_classifier_free_guidance_around_it(reward: str) -> None:
    model = shared_tess(classes=("a", "b"), tokenizer=True)
    inner = RewardGradient(model=reward, scale=2.0)

    def run(*guidance: Any) -> Any:
        return model.generate(PROMPTS, max_new_tokens=6, eos_token_id=-1, classes=["a", "b"], guidance=list(guidance))

    alone, neutral, both = run(inner), run(inner, ClassifierFree(scale=1.0)), run(inner, ClassifierFree(scale=3.0))
    assert torch.equal(alone.answers, neutral.answers)
    assert not torch.equal(both.answers, alone.answers) or not torch.equal(both.answers, run().answers)
    # One reward per evaluation, that of the answer with the class.
    assert both.metrics["reward"].shape == alone.metrics["reward"].shape
    torch.testing.assert_close(both.metrics["reward"][:, 0], alone.metrics["reward"][:, 0])
    with pytest.raises(ConfigError, match="Put it last"):
        run(ClassifierFree(scale=3.0), inner)


# Refusals


@pytest.fixture
def weightless(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_weights(monkeypatch, AutoModelForSequenceClassification)


@pytest.mark.usefixtures("weightless")
def test_a_fitting_reward_model_passes_without_its_weights(reward: str) -> None:
    tokenizer, asked = tiny_tokenizer(), reward_network._check.cache_info().misses
    for _ in range(2):
        RewardGradient(model=reward, position="expected_end").check(tokenizer)
    assert reward_network._check.cache_info().misses == asked + 1
    RewardGradient(model=reward).check(None)
    with pytest.raises(Weights):
        reward_network._load.__wrapped__(reward, torch.device("cpu"), torch.float32, ())


def _without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _two_outputs(folder: Path) -> None:
    classifier(num_labels=2).save_pretrained(folder)


def _language_model(folder: Path) -> None:
    text = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(text.replace("ForSequenceClassification", "ForCausalLM"), encoding="utf-8")


def _encoder(folder: Path) -> None:
    small = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=V, num_labels=1)
    AutoModelForSequenceClassification.from_config(small).save_pretrained(folder)


def _no_classifier(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "vits"}', encoding="utf-8")


def _endless(folder: Path) -> None:
    classifier(eos_token_id=None).save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (swapped, "another vocabulary: token .* is 'b' there and 'a' here"),
        (longer, r"token 260 is '<more>' there and None here \(261 and 260 tokens\)"),
        (without_tokenizer, "has no tokenizer that could be compared"),
        (_without_config, "neither a model folder here nor a hub repository"),
        (_two_outputs, "has 2 outputs; a reward is one number"),
        (_language_model, "was saved as LlamaForCausalLM, not as LlamaForSequenceClassification"),
        (_encoder, "BertForSequenceClassification, which has no `score` head over a decoder"),
        (_no_classifier, "'vits', for which there is no sequence classifier"),
        (_endless, "has no eos_token_id"),
    ],
)
def test_what_cannot_guide_is_refused_before_weights_are_loaded(
    spoil: Any, message: str, tmp_path: Path, weightless: None
) -> None:
    folder = write(tmp_path, classifier())
    spoil(tmp_path)
    with pytest.raises(L2DError, match=message):
        RewardGradient(model=folder, position="expected_end").check(tiny_tokenizer())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/at/all", "There is no folder"),
        ("./nowhere", "There is no folder"),
        ("no-such/model", "hub repository"),
    ],
)
def test_a_reward_model_that_is_nowhere_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardGradient(model=name).check(tiny_tokenizer())


def test_logits_over_another_number_of_tokens_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, classifier(vocab_size=V + 1))
    with pytest.raises(ConfigError, match=f"embeds {V + 1} tokens, but the diffusion model predicts {V}"):
        guide(RewardGradient(model=folder), random_logits())


def test_a_decoder_that_sees_later_tokens_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, classifier(is_causal=False))
    with pytest.raises(UnsupportedModelError, match="see later ones"):
        guide(RewardGradient(model=folder), random_logits())


def test_a_head_without_weights_is_refused(tmp_path: Path) -> None:
    model = classifier()
    state = {name: value for name, value in model.state_dict().items() if name != "score.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match="lacks the weights"):
        guide(RewardGradient(model=str(tmp_path)), random_logits())


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": ""},
        {"temperature": 0.0},
        {"scale": float("nan")},
        {"inner_steps": 0},
        {"every": 0},
        {"max_gradient_norm": 0.0},
        {"position": "eos"},
        {"gumbel": "yes"},
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        RewardGradient(**{"model": "any", **wrong})


def test_a_reward_model_must_be_named() -> None:
    with pytest.raises(ValidationError, match="model"):
        RewardGradient()  # type: ignore[call-arg]
