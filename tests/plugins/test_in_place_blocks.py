"""The in-place backbone in blocks: clean tokens beside noisy ones in training, keys and values kept in generation."""

import pytest
import torch
from diffusion_models import BIDIRECTIONAL, own_gradients, random_tokens, tess_lm, training_loss
from tiny_models import MASKED, tiny_lm
from transformers import DynamicCache

from l2d_framework.config import check_runs, parse_run
from l2d_framework.diffusion.loss import denoising_loss
from l2d_framework.diffusion.training_noise import Draws, NoiseRule, draw
from l2d_framework.errors import ConfigError, UnsupportedModelError
from l2d_framework.generation.infill import check_infilling
from l2d_framework.generation.prompts import pad_left
from l2d_framework.models.checkpoint import load, save
from l2d_framework.models.unloaded import UnloadedModel
from l2d_framework.registry import registry
from l2d_framework.training.data.collate import number_blocks
from l2d_framework.types import Layout
from l2d_plugins.backbones.blocks import BlockContext
from l2d_plugins.backbones.in_place import InPlace, InPlaceConfig
from l2d_plugins.twins import cache_name

KNOWN, LENGTH = 3, 11
WINDOWED = {"olmo3": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}}

families = pytest.mark.parametrize("family", BIDIRECTIONAL)
kinds = pytest.mark.parametrize(
    ("family", "attention"), [("llama", "bidirectional"), ("llama", "causal"), ("bert", "bidirectional")]
)


def layout(size, *, tokens=None, rows=2):
    """A prompt, an answer in blocks, and the same cut short in the second row, as the collator pads it."""
    tokens = random_tokens(rows, LENGTH) if tokens is None else tokens
    blocks = (1 + (torch.arange(LENGTH) - KNOWN) // size).clamp_min(0).repeat(rows, 1)
    if rows > 1:
        blocks[1, LENGTH - 2 :] = -1
    return Layout(tokens, blocks)


def asked(where):
    """Slots of all blocks; shorter rows repeat their last."""
    slots = [(row >= 1).nonzero()[:, 0] for row in where.blocks]
    width = max(map(len, slots))
    return torch.stack([torch.cat([row, row[-1:].expand(width - len(row))]) for row in slots])


def states(positions):
    """Noisy states and times that are functions of row and slot."""
    generator = torch.Generator().manual_seed(5)
    h, t = 0.5 * torch.randn(4, LENGTH, 32, generator=generator), torch.rand(4, LENGTH, generator=generator)
    rows = torch.arange(len(positions))[:, None]
    return h[rows, positions], t[rows, positions]


def features(backbone, where, positions=None, *, context=None):
    positions = asked(where) if positions is None else positions
    h, t = states(positions)
    return backbone.features(h, t, positions, backbone.read(where) if context is None else context, None)


def close(found, wanted, tolerance=1e-5):
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("family", "size"),
    [*((family, 4) for family in BIDIRECTIONAL), ("olmo3", 4), *(("llama", n) for n in (1, 3, 16))],
)
def test_kept_keys_and_values_give_what_one_pass_over_all_tokens_gives(family, size):
    backbone = tess_lm(tiny_lm(family, **WINDOWED.get(family, {})), block_size=size).backbone
    where = layout(size)
    joint = features(backbone, where)
    with torch.no_grad():
        context = backbone.read(where)
        assert context.keys is not None
        close(features(backbone, where, context=context), joint.detach())


@families
def test_what_was_appended_block_by_block_is_what_is_read_at_once(family):
    backbone, where = tess_lm(family, block_size=4).backbone, layout(4, rows=1)
    with torch.no_grad():
        context = backbone.read(Layout(where.tokens[:, :KNOWN], where.blocks[:, :KNOWN]))
        for first in range(KNOWN, LENGTH, 4):
            positions = torch.arange(first, min(first + 4, LENGTH))[None]
            close(features(backbone, where, positions, context=context), features(backbone, where, positions))
            context = backbone.extend(context, where.tokens[:, first : first + 4])


@kinds
@pytest.mark.parametrize("size", [2, 4])
def test_a_block_sees_every_earlier_token_and_no_token_of_its_own_or_a_later_block(family, attention, size):
    backbone, where = tess_lm(family, block_size=size, attention=attention).backbone, layout(size, rows=1)
    positions = asked(where)
    base = features(backbone, where).detach()
    for changed in range(LENGTH):
        tokens = where.tokens.clone()
        tokens[:, changed] += 1
        moved = (features(backbone, Layout(tokens, where.blocks)) - base).abs().amax(-1)[0]
        earlier = where.blocks[0, changed] < where.blocks[0, positions[0]]
        assert (moved[earlier] > 1e-5).all(), changed
        assert not moved[~earlier].any(), changed


@kinds
def test_a_known_turn_after_an_answer_is_seen_by_later_blocks_only(family, attention):
    backbone = tess_lm(family, block_size=2, attention=attention).backbone
    tokens = random_tokens(1, 9)
    blocks = torch.tensor([[0, 0, 1, 1, 0, 0, 2, 2, 3]])
    before, after = torch.tensor([[2, 3]]), torch.tensor([[6, 7, 8]])
    changed = tokens.clone()
    changed[:, 4] += 1
    moved = [
        (features(backbone, Layout(tokens, blocks), at) - features(backbone, Layout(changed, blocks), at))
        .abs()
        .amax(-1)
        for at in (before, after)
    ]
    assert not moved[0].any()
    assert (moved[1] > 1e-5).all()


ROLES = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0]]).bool()
"""A turn of a conversation, an answer, and the next turn."""


@pytest.mark.parametrize(
    ("family", "attention", "size"),
    [
        *((family, "bidirectional", 4) for family in BIDIRECTIONAL),
        *(("llama", "bidirectional", size) for size in (1, 2, 3, 16)),
        *(("llama", "causal", size) for size in (2, 4)),
        *(("bert", "bidirectional", size) for size in (1, 3)),
    ],
)
def test_an_answer_within_a_conversation_is_learnt_as_it_is_generated(family, attention, size, monkeypatch):
    model, answer = tess_lm(family, block_size=size, attention=attention), 7
    history, later = random_tokens(1, ROLES.shape[1]), random_tokens(1, 3, seed=1)
    asked, run = [], InPlace.features

    def features(self, h, t, positions, context, condition, **options):
        found = run(self, h, t, positions, context, condition, **options)
        asked.append((h.clone(), t.clone(), positions.clone(), found))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(InPlace, "features", features)
        options = {"max_new_tokens": answer, "eos_token_id": None, "num_inference_steps": 2}
        found = model.generate(pad_left(history.tolist()), **options)
    roles = torch.cat([ROLES, torch.ones(1, answer).bool(), torch.zeros(1, 3).bool()], 1)
    text = Layout(torch.cat([found.sequences, later], 1), number_blocks(roles, size))
    assert len(asked) == 2 * -(-answer // size)
    for h, t, positions, expected in asked:
        close(run(model.backbone, h, t, positions, model.backbone.read(text), None).detach(), expected)


@families
@pytest.mark.parametrize("parts", [(1,) * 8, (4, 4), (3, 4, 1), (8,)], ids=str)
def test_a_text_read_again_has_the_keys_and_values_of_one_that_was_extended(family, parts):
    backbone, tokens = tess_lm(family, block_size=4).backbone, random_tokens(2, LENGTH)
    known = torch.zeros_like(tokens)
    known[1, :2] = -1
    with torch.no_grad():
        again = backbone.read(Layout(tokens, known))
        grown = backbone.read(Layout(tokens[:, :KNOWN], known[:, :KNOWN]))
        for part in tokens[:, KNOWN:].split(parts, 1):
            grown = backbone.extend(grown, part)
        learnt = backbone.read(Layout(tokens, torch.where(known < 0, -1, layout(4).blocks.clamp_min(0))))
    for context in (grown, learnt):
        for found, wanted in zip(context.keys, again.keys, strict=True):
            for new, old in zip(found, wanted, strict=True):
                close(new[0], old[0])
                close(new[1, :, 2:], old[1, :, 2:])


@pytest.mark.parametrize("family", [*(family for family in BIDIRECTIONAL if family not in MASKED), "olmo3"])
def test_known_tokens_are_read_as_the_language_model_was_pretrained_to(family):
    backbone, tokens = (
        tess_lm(tiny_lm(family, **WINDOWED.get(family, {})), block_size=4).backbone,
        random_tokens(2, LENGTH),
    )
    with torch.no_grad():
        wanted = DynamicCache()  # made so, it keeps what no window sees any more
        backbone.lm(tokens, **{cache_name(backbone.lm): wanted})
        found = backbone.read(Layout(tokens, torch.zeros_like(tokens))).keys
    assert len(found) == len(wanted.layers)
    for (key, value), layer in zip(found, wanted.layers, strict=True):
        close(key, layer.keys)
        close(value, layer.values)


def taken(draws, chosen):
    return Draws(**{name: v if v.dim() == 1 else v[:, chosen] for name, v in vars(draws).items()})


@pytest.mark.parametrize(("family", "size"), [*((family, 4) for family in BIDIRECTIONAL), ("llama", 1), ("bert", 1)])
def test_in_training_every_loss_and_gradient_is_that_of_its_block_alone(family, size):
    model, where = tess_lm(family, block_size=size, space={"train_table": True}), layout(size, rows=1)
    draws = draw(model, where, NoiseRule([(0, 0, 0)]))
    assert len(draws.t.unique()) == -(-(LENGTH - KNOWN) // size)
    together = denoising_loss(model, where, draws)
    gradients = own_gradients(model, together.total)
    sums, losses = dict.fromkeys(gradients, 0), []
    for first in range(KNOWN, LENGTH, size):
        # As generation has it: nothing is there yet but what stands before the block.
        until = min(first + size, LENGTH)
        blocks = torch.where(torch.arange(until) < first, where.blocks[:, :until].clamp(max=0), 1)
        blocks = torch.where(torch.arange(until) < first, where.blocks[:, :until], blocks.max() + LENGTH)
        chosen = (draws.positions[0] >= first) & (draws.positions[0] < until)
        alone = denoising_loss(model, Layout(where.tokens[:, :until], blocks), taken(draws, chosen))
        losses.append(alone.tokens)
        for name, slope in own_gradients(model, alone.total).items():
            sums[name] = sums[name] + (0 if slope is None else slope)
    close(together.tokens, torch.cat(losses))
    for name, slope in gradients.items():
        close(torch.zeros(()) if slope is None else slope, sums[name] if slope is not None else torch.zeros(()), 1e-4)


@families
def test_the_loss_of_a_row_does_not_depend_on_its_batch_mates(family):
    model, where = tess_lm(family, block_size=4), layout(4)
    together = training_loss(model, where)
    for row, count in enumerate((LENGTH, LENGTH - 2)):
        part = Layout(where.tokens[row : row + 1, :count], where.blocks[row : row + 1, :count])
        close(training_loss(model, part, keys=[(0, 0, row)]).tokens, together.tokens[together.row == row])


def test_a_first_prediction_is_read_in_blocks_too():
    model, where = tess_lm(block_size=4).train(), layout(4)
    plain = training_loss(model, where).tokens
    conditioned = training_loss(model, where, self_conditioning=1.0, is_first_noisier=False).tokens
    assert (plain - conditioned).abs().max() > 1e-4
    model.backbone.gradient_checkpointing = True
    close(training_loss(model, where, self_conditioning=1.0, is_first_noisier=False).tokens, conditioned)


@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta"])
def test_gradient_checkpointing_gives_the_same_gradients(family):
    dropout = {"gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"), "roberta": ("hidden_dropout_prob",)}
    options = dict.fromkeys((*dropout.get(family, ()), "attention_probs_dropout_prob"), 0.0)
    model, where = tess_lm(tiny_lm(family, **options), block_size=4).train(), layout(4)
    plain = own_gradients(model, training_loss(model, where).total)
    model.backbone.gradient_checkpointing = True
    for name, slope in own_gradients(model, training_loss(model, where).total).items():
        if slope is not None:
            close(slope, plain[name])


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        *((family, "bidirectional") for family in BIDIRECTIONAL),
        *((family, "causal") for family in BIDIRECTIONAL if family not in MASKED),
    ],
)
def test_one_block_is_the_whole_canvas_where_no_known_token_would_see_noise(family, attention):
    """Under causal attention none does; else a single token in front has only its copy beside the noise."""
    known = KNOWN if attention == "causal" else int(family not in MASKED)
    where = Layout(random_tokens(1, LENGTH), (torch.arange(LENGTH) >= known).long()[None])
    positions = torch.arange(known, LENGTH)[None]
    with torch.no_grad():
        whole, blocks = (
            features(tess_lm(family, attention=attention, block_size=size).backbone, where, positions)
            for size in (None, LENGTH)
        )
    close(blocks, whole)


@families
def test_a_batch_generates_what_its_rows_generate_alone(family):
    prompts = [random_tokens(1, 5)[0].tolist(), random_tokens(1, 3, seed=1)[0].tolist()]
    options = {"max_new_tokens": 6, "num_inference_steps": 3, "eos_token_id": None}
    model = tess_lm(family, block_size=4)
    together = model.generate(pad_left(prompts), **options).answers
    for row, prompt in enumerate(prompts):
        assert torch.equal(model.generate(pad_left([prompt]), **options).answers[0], together[row])


@families
def test_answers_are_the_same_without_kept_keys_and_values(family, monkeypatch):
    prompts = pad_left([random_tokens(1, 5)[0].tolist(), random_tokens(1, 3, seed=1)[0].tolist()])
    options = {"max_new_tokens": 7, "num_inference_steps": 3, "eos_token_id": None}
    model = tess_lm(family, block_size=3)
    kept = model.generate(prompts, **options).answers
    monkeypatch.setattr(InPlace, "_read", lambda self, context, count: context)
    assert torch.equal(model.generate(prompts, **options).answers, kept)


def test_every_token_is_read_once(monkeypatch):
    read, run = [], InPlace._run
    monkeypatch.setattr(
        InPlace, "_run", lambda self, inputs, *rest: read.append(inputs.shape[1]) or run(self, inputs, *rest)
    )
    model = tess_lm(block_size=4)
    read.clear()
    model.generate(pad_left([list(range(5, 25))]), max_new_tokens=8, num_inference_steps=3, eos_token_id=None)
    # The prompt; three evaluations of four slots and the one before them; the block; three more.
    assert read == [20, 5, 5, 5, 4, 5, 5, 5]


def test_a_model_of_one_block_per_sequence_still_grows_its_answer_by_reading_all_again():
    model = tess_lm()
    context = model.backbone.extend(model.backbone.read(layout(4)), random_tokens(2, 2))
    assert not isinstance(context, BlockContext)
    other = tess_lm(block_size=3).generate(pad_left([[5, 6, 7]]), max_new_tokens=6, eos_token_id=None).answers
    grown = model.generate(pad_left([[5, 6, 7]]), max_new_tokens=6, block_size=3, eos_token_id=None).answers
    assert not torch.equal(other, grown)


def test_a_saved_model_generates_the_same_in_blocks(tmp_path):
    model = tess_lm(block_size=4, tokenizer=True)
    save(model, tmp_path)
    again = load(tmp_path)
    assert again.block_size == again.backbone.block_size == 4
    options = {"max_new_tokens": 6, "eos_token_id": None, "num_inference_steps": 3}
    first, second = (lm.generate(pad_left([[5, 6, 7]]), **options).answers for lm in (model, again))
    assert torch.equal(first, second)


def test_classes_can_be_guided_in_blocks():
    model = tess_lm(block_size=4, classes=("a", "b"))
    options = {"max_new_tokens": 8, "eos_token_id": None, "num_inference_steps": 3}
    batch = pad_left([[5, 6, 7]])
    plain, guided = (
        model.generate(batch, classes=["a"], guidance=guidance, **options).answers
        for guidance in ([], [{"name": "classifier_free", "scale": 50.0}])
    )
    assert not torch.equal(plain, guided)


@pytest.mark.parametrize("size", [None, 1, 2, 8])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("shift", [None, True, False])
def test_only_blocks_whose_noise_would_go_unseen_are_refused(size, attention, shift):
    config = InPlaceConfig(attention=attention, label_shift=shift)
    if size == 1 and attention == "causal" and shift is not False:
        with pytest.raises(ConfigError, match="block_size=1 its noise would go unseen") as caught:
            config.check(tiny_lm().config, size)
        for name, backbone in registry().components("backbone").items():
            if f"use the backbone {name!r}" in str(caught.value):
                backbone().check(tiny_lm().config, size)
    else:
        config.check(tiny_lm().config, size)


@pytest.mark.parametrize(("trained", "wanted"), [(4, 5), (4, 8), (1, 2), (4, 4), (4, 3), (4, 1), (None, 8)])
def test_blocks_larger_than_those_learnt_are_refused_before_weights_load(trained, wanted, tmp_path, saved_tiny_lm):
    model = tess_lm(block_size=trained, tokenizer=True)
    save(model, tmp_path)
    written = {"model": {"base": str(saved_tiny_lm())}, "method": "tess"}
    run = parse_run({**written, "block_size": trained, "sampling": {"block_size": wanted}})
    options = {"max_new_tokens": 6, "eos_token_id": None, "num_inference_steps": 2, "block_size": wanted}
    doors = (
        lambda: check_runs([run]),
        lambda: UnloadedModel(str(tmp_path)).sampling({"block_size": wanted}),
        lambda: model.generate(pad_left([[5, 6, 7]]), **options),
    )
    for door in doors:
        if trained is not None and wanted > trained:
            with pytest.raises(
                ConfigError, match=f"denoise {trained} tokens together; .* got block_size={wanted}.*Set"
            ):
                door()
        else:
            door()


def test_a_model_of_blocks_fills_no_gaps():
    with pytest.raises(ConfigError, match="attention: bidirectional and block_size: null"):
        check_infilling(tess_lm(block_size=4).backbone)


def test_a_model_without_a_cache_is_refused_in_blocks_only():
    lm = tiny_lm()
    run = lm.model.forward

    def forward(*, inputs_embeds, attention_mask, position_ids, use_cache, cache=None, past_key_values=None):
        where = attention_mask[..., -inputs_embeds.shape[1] :]
        return run(inputs_embeds=inputs_embeds, attention_mask=where, position_ids=position_ids, use_cache=use_cache)

    lm.model.forward = forward
    backbone = InPlaceConfig().build(lm).in_blocks(None)
    with pytest.raises(
        UnsupportedModelError, match=r"cannot serve LlamaForCausalLM: with a cache it says something else"
    ):
        backbone.in_blocks(4)


@pytest.mark.parametrize("family", [family for family in BIDIRECTIONAL if family not in MASKED])
def test_under_causal_attention_a_prompt_is_read_once_and_the_canvas_says_what_it_says_otherwise(family):
    backbone, tokens = tess_lm(family, attention="causal").backbone, random_tokens(2, LENGTH)
    known = torch.zeros_like(tokens)
    known[1, :2] = -1
    positions, read = torch.arange(LENGTH, LENGTH + 4).expand(2, -1), []
    h, t = states(positions - LENGTH)
    again = backbone.features(h, t, positions, backbone.read(Layout(tokens, known)), None).detach()
    backbone.lm.base_model.register_forward_pre_hook(
        lambda _, args, given: read.append(given["inputs_embeds"].shape[1]), with_kwargs=True
    )
    with torch.no_grad():
        context = backbone.read(Layout(tokens, known))
        assert read == [LENGTH]
        for _ in range(3):
            close(backbone.features(h, t, positions, context, None), again)
    assert read[1:] == [4 + 1] * 3, "what is asked about and the last token of the prompt"
