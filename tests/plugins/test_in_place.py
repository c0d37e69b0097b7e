"""The in-place backbone over every family it serves; what holds over a Llama alone is in the conformance kit."""

import warnings
from copy import copy
from functools import cache

import pytest
import torch
from diffusion_models import BIDIRECTIONAL, own_gradients, random_tokens, shared_tess, tess_lm, training_loss
from pydantic import ValidationError
from tiny_models import MASKED, SIZES, tiny_lm
from torch.nn import functional
from transformers import AutoModelForMaskedLM, ModernBertConfig, T5Config
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.mistral import modeling_mistral

from l2d_framework.errors import ConfigError, UnsupportedModelError
from l2d_framework.generation.infill import check_infilling
from l2d_framework.generation.prompts import pad_left
from l2d_framework.types import Layout
from l2d_plugins.backbones.in_place import InPlaceConfig

LENGTH, ASKED = 9, [3, 4, 6, 8]

families = pytest.mark.parametrize("family", BIDIRECTIONAL)
few = pytest.mark.parametrize("family", ["llama", "roberta"])

WINDOWS = {
    "mistral": {"sliding_window": 3},
    "phi3": {"sliding_window": 3},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 3},
}
"""Of every layer."""
LOCAL_AND_GLOBAL = {
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 3},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3},
}
"""Windows of some layers."""


@cache
def wide(family):
    """The model without the window that is its family's in tests."""
    return tess_lm(tiny_lm(family, **({"sliding_window": None} if family == "mistral" else {}))).backbone


def layout(tokens=None, *, padding=(0, 0, 0), asked=ASKED):
    """Known tokens before, between and after the slots asked about."""
    tokens = random_tokens(len(padding), LENGTH) if tokens is None else tokens
    blocks = torch.zeros_like(tokens)
    blocks[:, asked] = 1
    for row, count in enumerate(padding):
        blocks[row, :count] = -1
    return Layout(tokens, blocks)


def states(rows=3, count=4):
    generator = torch.Generator().manual_seed(5)
    return 0.5 * torch.randn(rows, count, 32, generator=generator), torch.rand(rows, count, generator=generator)


def logits(backbone, where, *, asked=ASKED, given=None, **options):
    h, t = states(len(where.tokens), len(asked)) if given is None else given
    positions = torch.tensor(asked).expand(len(where.tokens), -1)
    with torch.no_grad():
        found = backbone.features(h, t, positions, backbone.read(where), options.get("condition"))
        return backbone.head(found)


def close(found, wanted, tolerance=1e-4):
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


def of_transformers(backbone, where, mask):
    """Logits of all slots from the language model itself, given the same embeddings and a mask of ours."""
    h, t = states()
    with torch.no_grad():
        embedded = backbone.lm.get_input_embeddings()(where.tokens)
        embedded[:, ASKED] = h + backbone.time((1 - t)[..., None])
        return backbone.lm(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits


@families
def test_a_change_of_the_last_token_reaches_the_first_output(family):
    backbone = wide(family)
    tokens, asked = random_tokens(1, LENGTH), [1]
    changed = tokens.clone()
    changed[:, -1] += 1
    base, other = (logits(backbone, layout(ids, padding=(0,), asked=asked), asked=asked) for ids in (tokens, changed))
    assert (other - base).abs().max() > 1e-3


@pytest.mark.parametrize("family", [name for name in BIDIRECTIONAL if name not in MASKED])
def test_with_causal_attention_no_later_token_is_seen_and_every_earlier_one_is(family):
    backbone, asked = shared_tess(family, attention="causal").backbone, [4]
    assert not backbone.sees_later
    tokens = random_tokens(1, LENGTH)
    base = logits(backbone, layout(tokens, padding=(0,), asked=asked), asked=asked)
    for changed in range(LENGTH):
        other = tokens.clone()
        other[:, changed] += 1
        effect = (logits(backbone, layout(other, padding=(0,), asked=asked), asked=asked) - base).abs().max()
        assert effect > 1e-4 if changed < 4 else effect == 0, changed


@families
def test_logits_of_the_slots_asked_about_are_those_of_the_whole_text(family):
    backbone, where = wide(family), layout()
    seen = torch.ones_like(where.tokens) if family in MASKED else torch.zeros(3, 1, LENGTH, LENGTH)
    whole = of_transformers(backbone, where, seen)
    close(logits(backbone, where), whole[:, [place - backbone.shift for place in ASKED]])


@pytest.mark.parametrize(
    ("family", "options"),
    [*((name, {}) for name in BIDIRECTIONAL if name not in MASKED), *WINDOWS.items(), *LOCAL_AND_GLOBAL.items()],
)
def test_causal_attention_is_that_of_the_pretrained_model(family, options):
    backbone = tess_lm(tiny_lm(family, **options), attention="causal").backbone
    where = layout()
    whole = of_transformers(backbone, where, torch.ones_like(where.tokens))
    close(logits(backbone, where), whole[:, [place - 1 for place in ASKED]])


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("family", WINDOWS)
def test_layers_of_a_window_see_as_far_to_either_side_as_they_see_back(family, attention, padding):
    backbone = tess_lm(tiny_lm(family, **WINDOWS[family]), attention=attention).backbone
    tokens, asked, speaks = random_tokens(1, 14), [7], 6
    base = logits(backbone, layout(tokens, padding=(padding,), asked=asked), asked=asked)
    for changed in (place for place in range(padding, 14) if place != asked[0]):
        other = tokens.clone()
        other[:, changed] += 1
        effect = (logits(backbone, layout(other, padding=(padding,), asked=asked), asked=asked) - base).abs().max()
        # Two layers, which see two tokens to a side each.
        is_seen = abs(changed - speaks) <= 4 and (changed <= speaks or attention == "bidirectional")
        assert effect > 1e-5 if is_seen else effect == 0, changed


@pytest.mark.parametrize(("family", "options"), [*WINDOWS.items(), *LOCAL_AND_GLOBAL.items()])
def test_a_window_as_long_as_the_canvas_is_none(family, options):
    where = layout()
    none = {"use_sliding_window": False} if family == "qwen2" else {"sliding_window": 4096}
    found = [
        logits(tess_lm(tiny_lm(family, **options | window)).backbone, where)
        for window in (none, {"sliding_window": LENGTH}, {})
    ]
    assert torch.equal(found[1], found[0])
    assert not torch.equal(found[2], found[0])


def test_a_masked_model_sees_the_window_that_it_was_pretrained_with():
    options = {**SIZES, "cls_token_id": 1, "sep_token_id": 2, "initializer_range": 0.3}
    config = ModernBertConfig(**options, local_attention=4, global_attn_every_n_layers=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = InPlaceConfig().build(AutoModelForMaskedLM.from_config(config).eval())
    where = layout()
    whole = of_transformers(backbone, where, None)
    close(logits(backbone, where), whole[:, ASKED])


def test_a_window_that_no_mask_of_ours_tells_is_refused(monkeypatch):
    def wider(config, *given, **named):
        config = copy(config)
        config.sliding_window += 1
        return create_sliding_window_causal_mask(config, *given, **named)

    monkeypatch.setattr(modeling_mistral, "create_sliding_window_causal_mask", wider)
    with pytest.raises(UnsupportedModelError, match="its layers see a window of 4 tokens in a way of their own"):
        InPlaceConfig().build(tiny_lm("mistral"))


@families
def test_eager_and_sdpa_attention_agree(family):
    where, found = layout(padding=(0, 2, 1)), []
    for kernel in ("eager", "sdpa"):
        backbone = tess_lm(tiny_lm(family, attn_implementation=kernel)).backbone
        assert backbone.lm.config._attn_implementation == kernel
        found.append(logits(backbone, where))
    close(*found)


def attended(monkeypatch):
    """Masks that attention is given from now on; one of zeros is put in the place of none."""
    found, attend = [], functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **options):
        found.append(attn_mask)
        assert not options.get("is_causal")
        mask = query.new_zeros(1, 1, query.shape[-2], key.shape[-2]) if attn_mask is None else attn_mask
        return attend(query, key, value, attn_mask=mask, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    return found


@families
def test_a_canvas_without_padding_needs_no_mask_and_says_what_it_says_with_one(family, monkeypatch):
    backbone = wide(family)
    canvases = {"whole": layout(), "longer": layout(asked=[3, 4, 6]), "padded": layout(padding=(0, 2, 1))}
    for name, where in canvases.items():
        asked = [3, 4, 6, LENGTH, LENGTH + 1] if name == "longer" else ASKED
        given = states(count=len(asked))
        plain = logits(backbone, where, asked=asked, given=given)
        with monkeypatch.context() as patch:
            masks = attended(patch)
            assert torch.equal(logits(backbone, where, asked=asked, given=given), plain)
        assert masks
        assert all((mask is None) == (name != "padded") for mask in masks)


@families
def test_a_row_says_the_same_alone_and_padded_beside_others(family):
    backbone, padding = shared_tess(family).backbone, (0, 2, 1)
    where, (h, t) = layout(padding=padding), states()
    together = logits(backbone, where)
    for filler in (0, 9):
        tokens = torch.where(where.blocks < 0, filler, where.tokens)
        close(logits(backbone, Layout(tokens, where.blocks)), together)
    for row, count in enumerate(padding):
        part = Layout(where.tokens[row : row + 1, count:], where.blocks[row : row + 1, count:])
        asked = [place - count for place in ASKED]
        alone = logits(backbone, part, asked=asked, given=(h[row : row + 1], t[row : row + 1]))
        close(alone, together[row : row + 1])


@few
def test_slots_after_the_text_are_asked_about_as_if_they_were_in_it(family):
    backbone, asked = shared_tess(family).backbone, [7, 8]
    where = layout(asked=asked)
    shorter = Layout(where.tokens[:, :7], where.blocks[:, :7])
    close(logits(backbone, shorter, asked=asked), logits(backbone, where, asked=asked))


def test_the_label_shift_reads_the_output_before():
    lm, asked = tiny_lm(), list(range(LENGTH))
    where = layout(asked=asked)
    shifted, straight = (logits(tess_lm(lm, label_shift=on).backbone, where, asked=asked) for on in (True, False))
    close(shifted[:, 1:], straight[:, :-1], 0)
    assert not shifted[:, 0].any()
    assert straight[:, 0].any()


def test_no_output_speaks_about_the_first_token_of_a_padded_row():
    backbone, asked = shared_tess().backbone, [2, 3]
    where = layout(random_tokens(2, LENGTH), padding=(0, 2), asked=asked)
    found = logits(backbone, where, asked=asked)
    assert not found[1, 0].any()
    assert found[0].any(-1).all()
    assert found[1, 1].any()
    filled = torch.where(where.blocks < 0, 9, where.tokens)
    close(logits(backbone, Layout(filled, where.blocks), asked=asked), found)


@families
def test_the_label_shift_is_what_the_model_was_pretrained_for(family):
    assert shared_tess(family).backbone.shift == (family not in MASKED)


@families
def test_prompts_stand_unchanged_in_what_is_generated(family):
    prompts = [random_tokens(1, 5)[0].tolist(), random_tokens(1, 3, seed=1)[0].tolist()]
    batch = pad_left(prompts)
    for size in (None, 2):
        found = shared_tess(family).generate(
            batch, max_new_tokens=5, block_size=size, num_inference_steps=3, eos_token_id=None
        )
        assert torch.equal(found.sequences[:, :5], batch.input_ids)
        assert found.answers.shape == (2, 5)


@families
def test_a_batch_generates_what_its_rows_generate_alone(family):
    prompts = [random_tokens(1, 5)[0].tolist(), random_tokens(1, 3, seed=1)[0].tolist()]
    options = {"max_new_tokens": 5, "num_inference_steps": 4, "eos_token_id": None, "block_size": 3}
    model = shared_tess(family)
    together = model.generate(pad_left(prompts), **options).answers
    for row, prompt in enumerate(prompts):
        assert torch.equal(model.generate(pad_left([prompt]), **options).answers[0], together[row])


def ragged():
    """A row with two slots to learn beside one with five, which the shorter row is filled up to."""
    blocks = torch.tensor([[0, 0, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1]])
    return Layout(random_tokens(2, 6), blocks)


@families
def test_slots_repeated_to_fill_up_a_row_change_no_gradient(family):
    model, where = tess_lm(family, space={"train_table": True}), ragged()
    together = own_gradients(model, training_loss(model, where).total)
    alone = []
    for row in range(2):
        part = Layout(where.tokens[row : row + 1], where.blocks[row : row + 1])
        alone.append(own_gradients(model, training_loss(model, part, keys=[(0, 0, row)]).total))
    assert together["backbone.time.weight"].abs().max() > 1e-3
    for name, found in together.items():
        parts = [gradients[name] for gradients in alone if gradients[name] is not None]
        if found is None:
            assert not parts, name
        else:
            torch.testing.assert_close(found, sum(parts), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "roberta"])
def test_gradient_checkpointing_runs_layers_twice_and_gives_the_same_gradients(family):
    options = dict.fromkeys(DROPOUT.get(family, ()), 0.0)
    model, where, calls = tess_lm(tiny_lm(family, **options)).train(), ragged(), []
    norm = next(module for name, module in model.backbone.lm.named_modules() if name.endswith(NORMS))
    norm.register_forward_hook(lambda *_: calls.append(None))
    plain = own_gradients(model, training_loss(model, where).total)
    once = len(calls)
    model.backbone.gradient_checkpointing = True
    with warnings.catch_warnings():
        # A user would be told of transformers' old names.
        warnings.simplefilter("error")
        assert model.backbone.gradient_checkpointing
    saved = own_gradients(model, training_loss(model, where).total)
    assert len(calls) - once == 2 * once
    model.backbone.gradient_checkpointing = False
    assert not model.backbone.gradient_checkpointing
    for name, wanted in plain.items():
        assert (saved[name] is None) == (wanted is None)
        if wanted is not None:
            close(saved[name], wanted, 1e-5)


DROPOUT = {
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "roberta": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
}
NORMS = ("layers.0.input_layernorm", "h.0.ln_1", "layer.0.attention.output.LayerNorm")


@families
def test_a_time_near_the_data_marks_less_than_one_near_the_noise(family):
    backbone, where = shared_tess(family).backbone, layout()
    h, _ = states()
    clean, late, early = (logits(backbone, where, given=(h, torch.full((3, 4), t))) for t in (1.0, 0.99, 0.0))
    assert (late - clean).abs().max() < (early - clean).abs().max()


@families
def test_a_slot_without_noise_that_holds_its_tokens_embedding_is_a_known_token(family):
    backbone = tess_lm(family).backbone
    where, t = layout(), torch.ones(3, len(ASKED))
    asked = [2]
    known = Layout(where.tokens, torch.where(where.blocks == 1, 0, where.blocks))
    h = backbone.table()[where.tokens].detach()
    wanted = logits(backbone, known, asked=asked, given=(h[:, asked], t[:, :1]))
    everywhere = logits(backbone, where, asked=[*asked, *ASKED], given=(h[:, [*asked, *ASKED]], torch.ones(3, 5)))
    close(everywhere[:, :1], wanted)


def test_random_initialization_forgets_the_weights_and_is_seeded():
    lm, weights = tiny_lm(), {name: w.clone() for name, w in tiny_lm().named_parameters()}
    built = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        built.append(dict(InPlaceConfig(initialization="random").build(lm).lm.named_parameters()))
    for name, first in built[0].items():
        assert torch.equal(built[1][name], first)
        if first.ndim > 1:
            assert not torch.equal(built[2][name], first)
            assert not torch.equal(weights[name], first)
    assert all(torch.equal(now, weights[name]) for name, now in lm.named_parameters())
    # Loading what was trained must not forget it again.
    assert InPlaceConfig(initialization="random").build(lm).config == InPlaceConfig()
    kept = InPlaceConfig().build(lm).lm
    assert all(torch.equal(now, weights[name]) for name, now in kept.named_parameters())


@few
def test_a_class_changes_the_answer_of_its_own_positions_row(family):
    backbone, where = shared_tess(family, classes=("a", "b")).backbone, layout()
    condition = torch.full((3, len(ASKED)), -1)
    base = logits(backbone, where, condition=condition)
    close(logits(backbone, where), base, 0)
    condition[1] = 1
    other = logits(backbone, where, condition=condition)
    close(other[[0, 2]], base[[0, 2]])
    assert (other[1] - base[1]).abs().max() > 1e-3


def test_class_embeddings_start_without_effect():
    where = layout()
    backbone = InPlaceConfig(num_classes=2).build(tiny_lm())
    close(logits(backbone, where, condition=torch.ones(3, len(ASKED), dtype=torch.int64)), logits(backbone, where), 0)


@families
def test_all_weights_of_the_language_model_are_trained(family):
    model = tess_lm(family)
    gradients = own_gradients(model, training_loss(model, ragged()).total)
    assert {name for name in gradients if name.startswith("backbone.lm.")}
    assert not [name for name, slope in gradients.items() if slope is None and "pooler" not in name]


def test_encoder_decoders_are_refused():
    with pytest.raises(UnsupportedModelError, match="'t5' is an encoder-decoder"):
        InPlaceConfig().check(T5Config(), None)


@pytest.mark.parametrize("family", ["gemma3_text", "gemma2"])
def test_a_family_that_cannot_be_served_faithfully_is_refused(family):
    with pytest.raises(UnsupportedModelError, match=r"cannot serve Gemma\dFor.*: its .*\. Choose a model of another"):
        InPlaceConfig().build(tiny_lm(family))


def test_a_model_made_causal_fills_no_gaps_and_says_which_would():
    with pytest.raises(ConfigError, match="with attention: bidirectional"):
        check_infilling(shared_tess("llama", attention="causal").backbone)
    check_infilling(shared_tess("llama").backbone)


def test_a_masked_model_cannot_be_made_causal_by_its_own_attention():
    backbone = InPlaceConfig(attention="causal").build(tiny_lm("roberta"))
    assert not backbone.sees_later


@pytest.mark.parametrize("wrong", [{"attention": "sideways"}, {"initialization": 1}, {"time_bias": 1}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        InPlaceConfig(**wrong)
