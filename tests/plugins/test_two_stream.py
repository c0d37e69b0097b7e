"""The two-stream backbone over every family it promises; what holds over a Llama alone is in the conformance kit."""

import copy
import gc
import math
import tomllib
import warnings
from types import MethodType

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusion_models import (
    PROVEN,
    all_known,
    ask_everywhere,
    backbone_config,
    diffusion_lm,
    fresh_lm,
    own_gradients,
    random_tokens,
    shared_lm,
    supervised,
    training_loss,
    two_stream,
)
from packaging.version import Version
from torch.nn import functional
from torch.utils import checkpoint
from transformers.models.llama.modeling_llama import LlamaAttention

from l2d_framework.errors import ConfigError, UnsupportedModelError
from l2d_framework.types import Layout
from l2d_plugins.backbones.two_stream import ADAPTER
from l2d_plugins.families import TESTED, advice

OTHERS = ("stablelm", "phi", "cohere", "gpt_neox")
"""Families that are served without being promised, since they are built unlike the others: layer norms with biases,
parallel branches that share a norm, norms without a weight vector of their own class, another name for the cache."""

LENGTH = 9
PADDING = (0, 2, 5)

families = pytest.mark.parametrize("family", PROVEN)
variants = pytest.mark.parametrize("variant", ["lora", "full"])


def tokens(rows=3):
    return random_tokens(rows, LENGTH)


def plain_logits(lm, layout):
    """What transformers itself says, told of the padding as its own `generate` tells it."""
    mask = layout.present.long()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        return lm(layout.tokens, attention_mask=mask, position_ids=positions).logits


def close(found, wanted, tolerance=1e-4):
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", [*PROVEN, *OTHERS])
@variants
def test_at_time_zero_logits_are_bit_for_bit_the_language_models(family, variant):
    model, layout = shared_lm(family, variant=variant), all_known(tokens(), padding=PADDING)
    here, wanted = layout.present, plain_logits(shared_lm(family, variant=variant).backbone.lm, layout)
    t = torch.zeros(len(PADDING), LENGTH)
    t[:, ::2] = 0.7
    with torch.no_grad():
        everywhere = model(ask_everywhere(model, layout, t=0.0)).logits
        alternating = model(ask_everywhere(model, layout, t=t)).logits
    assert torch.equal(everywhere[here], wanted[here])
    assert torch.equal(alternating[here & (t == 0)], wanted[here & (t == 0)])
    assert ((alternating - wanted)[here & (t > 0)].abs().amax(-1) > 1e-2).all()


@families
@variants
@pytest.mark.parametrize("gates", ["closed", "open"])
def test_a_fresh_diffusion_path_changes_no_logit_at_any_time(family, variant, gates):
    model, layout = fresh_lm(family, variant=variant, gates=gates), all_known(tokens())
    t = torch.rand(len(PADDING), LENGTH)
    with torch.no_grad():
        assert torch.equal(model(ask_everywhere(model, layout, t=t)).logits, plain_logits(model.backbone.lm, layout))


@families
def test_closed_gates_let_the_noisy_state_through_unchanged(family):
    model = fresh_lm(family)
    backbone = two_stream(model)
    torch.nn.init.normal_(backbone.conditioning.final[2].weight, std=100.0)
    query = ask_everywhere(model, all_known(tokens()))
    with torch.no_grad():
        h = model.parametrization.embed(query.x, query.t, model.schedule, backbone.table(), None)
        weight = backbone.conditioning(query.t, None)[1]
        features = backbone.features(h, query.t, query.positions, query.context, None)
    assert torch.equal(features, query.context.hidden + weight * h)
    assert weight.abs().max() > 1e-3


@families
def test_behind_open_gates_is_what_the_language_model_computes(family):
    model, layout = fresh_lm(family, gates="open"), all_known(tokens())
    backbone, entered = two_stream(model), []
    torch.nn.init.normal_(backbone.conditioning.final[2].weight, std=100.0)
    query = ask_everywhere(model, layout)
    with torch.no_grad():
        first = backbone.main.layers[0].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
        backbone.lm(layout.tokens)
        first.remove()
        weight = backbone.conditioning(query.t, None)[1]
        features = backbone.features(entered[0], query.t, query.positions, query.context, None)
    close(features, (1 + weight) * query.context.hidden)
    assert weight.abs().max() > 1e-3


@pytest.mark.parametrize("gates", ["closed", "open"])
def test_projections_learn_as_soon_as_the_path_counts_only_behind_open_gates(gates):
    model = fresh_lm(gates=gates)
    torch.nn.init.normal_(two_stream(model).conditioning.final[2].weight, std=0.1)
    found = own_gradients(model, training_loss(model, supervised(tokens())).total)
    learning = [float(gradient.norm()) > 1e-6 for name, gradient in found.items() if "lora_B" in name]
    assert learning and all(learning) == any(learning) == (gates == "open")


@families
@variants
def test_a_read_prefix_that_is_extended_says_what_the_whole_text_says(family, variant):
    model, layout = shared_lm(family, variant=variant), all_known(tokens(), padding=PADDING)
    whole = ask_everywhere(model, layout)
    with torch.no_grad():
        wanted = model(whole).logits
        context = model.backbone.read(Layout(layout.tokens[:, :6], layout.blocks[:, :6]))
        context = model.backbone.extend(context, layout.tokens[:, 6:8])
        both = whole.replace(x=whole.x[:, 6:8], t=whole.t[:, 6:8], positions=whole.positions[:, 6:8], context=context)
        close(model(both).logits, wanted[:, 6:8])
        context = model.backbone.extend(context, layout.tokens[:, 8:])
        last = whole.replace(x=whole.x[:, 8:], t=whole.t[:, 8:], positions=whole.positions[:, 8:], context=context)
        close(model(last).logits, wanted[:, 8:])


@pytest.mark.parametrize("family", [*PROVEN, *OTHERS])
@variants
def test_a_padded_row_says_what_it_says_alone(family, variant):
    model, layout = shared_lm(family, variant=variant), all_known(tokens(), padding=PADDING)
    query = ask_everywhere(model, layout)
    with torch.no_grad():
        together = model(query).logits
        for row, skipped in enumerate(PADDING):
            alone = query.replace(
                x=query.x[row : row + 1, skipped:],
                t=query.t[row : row + 1, skipped:],
                positions=query.positions[row : row + 1, skipped:] - skipped,
                context=model.backbone.read(all_known(layout.tokens[row : row + 1, skipped:])),
            )
            close(together[row, skipped:], model(alone).logits[0])


@families
@variants
def test_some_positions_say_what_they_say_among_all(family, variant):
    model = shared_lm(family, variant=variant)
    query = ask_everywhere(model, all_known(tokens(), padding=PADDING))
    chosen = torch.tensor([[1, 8, 4], [2, 3, 8], [5, 6, 8]])
    rows = torch.arange(len(chosen))[:, None]
    some = query.replace(x=query.x[rows, chosen], t=query.t[rows, chosen], positions=query.positions[rows, chosen])
    with torch.no_grad():
        close(model(some).logits, model(query).logits[rows, chosen])


@families
def test_a_noisy_position_feels_the_tokens_before_it_and_no_other(family):
    model, layout = shared_lm(family), all_known(tokens(1))
    query = ask_everywhere(model, layout)
    changed = layout.tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 250 + 4
    with torch.no_grad():
        before, after = model(query), model(query.replace(context=model.backbone.read(all_known(changed))))
    effect = (after.logits - before.logits)[0].abs().amax(-1)
    assert (effect[:4] == 0).all()
    assert (effect[4:] > 1e-4).all()


@pytest.mark.parametrize("first", [14, 6, 1])
def test_a_noisy_position_feels_what_the_windows_of_all_layers_reach(tiny_lm, first):
    model, length = diffusion_lm(tiny_lm("mistral", sliding_window=3)), 14
    texts, position = random_tokens(1, length).repeat(length, 1), torch.full((length, 1), length)
    texts[range(length), range(length)] += 1
    generator = torch.Generator().manual_seed(5)
    h = torch.randn(1, 1, 32, generator=generator).expand(length, 1, -1)
    with torch.no_grad():
        context = model.backbone.read(all_known(texts[:, :first]))
        for place in range(first, length):
            context = model.backbone.extend(context, texts[:, place : place + 1])
        found = model.backbone.features(h, torch.full((length, 1), 0.5), position, context, None)[:, 0]
    moved = (found - found[0]).abs().amax(-1)
    # Two layers, which see two tokens back each; the noisy one stands where the last known one is.
    assert (moved[-5:] > 1e-4).all()
    assert moved[:-5].max() < 1e-6


@families
@variants
def test_every_own_weight_learns_but_the_bias_that_cancels_and_the_language_model_does_not(family, variant):
    model = diffusion_lm(family, variant=variant, classes=("a", "b"))
    loss = training_loss(model, supervised(tokens()), classes=torch.tensor([0, 1, -1]))
    found = own_gradients(model, loss.total)
    dead = {name for name, gradient in found.items() if gradient is None or gradient.norm() < 1e-4}
    # The last bias of w is the same at t and at 0, so it is never felt.
    assert dead == {"backbone.conditioning.final.2.bias"}
    assert all(weight.grad is None and not weight.requires_grad for weight in model.backbone.lm.parameters())


@pytest.mark.parametrize("family", [*PROVEN, *OTHERS])
@variants
def test_every_modulation_vector_of_every_layer_learns(family, variant):
    model = diffusion_lm(family, variant=variant)
    found = own_gradients(model, training_loss(model, supervised(tokens())).total)
    for number, layer in enumerate(two_stream(model).shadows):
        bias = found[f"backbone.conditioning.layers.{number}.2.bias"]
        assert (bias.view(layer.chunks, -1).norm(dim=-1) > 1e-8).all()


@families
@variants
def test_at_the_start_the_final_weight_alone_learns(family, variant):
    model = fresh_lm(family, variant=variant)
    found = own_gradients(model, training_loss(model, supervised(tokens())).total)
    learning = {name for name, gradient in found.items() if gradient is not None and gradient.norm() > 1e-4}
    assert learning == {"backbone.conditioning.final.2.weight"}


def snapshot(lm):
    return {name: value.clone() for name, value in lm.state_dict().items()}


def unchanged(lm, before):
    after = lm.state_dict()
    hooks = [hook for module in lm.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]
    return not hooks and list(before) == list(after) and all(torch.equal(after[name], before[name]) for name in before)


@families
@variants
def test_building_training_and_merging_leave_the_language_model_as_it_was(tiny_lm, family, variant):
    lm, prompt = tiny_lm(family), tokens(2)
    before, answer = snapshot(lm), lm.generate(prompt, max_new_tokens=4, do_sample=False)
    model = diffusion_lm(lm, variant=variant)
    optimizer = torch.optim.SGD(model.own_parameters().values(), lr=1.0)
    model.train()
    training_loss(model, supervised(tokens())).total.backward()
    optimizer.step()
    model.eval()
    model.generate(prompt, max_new_tokens=2, num_inference_steps=3)
    assert unchanged(lm, before)
    assert torch.equal(lm.generate(prompt, max_new_tokens=4, do_sample=False), answer)


@families
@pytest.mark.parametrize("variant", ["lora", "full"])
def test_what_is_folded_changes_no_logit_and_no_weight(family, variant):
    model = diffusion_lm(family, variant=variant)
    query = ask_everywhere(model, all_known(tokens(), padding=PADDING))
    folding = [module for module in model.backbone.shadows.modules() if hasattr(module, "foldable")]
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        before = model(query).logits
        model.backbone.merge("always")
        assert all(module.folded.has == (variant == "lora") for module in folding)
        close(model(query).logits, before, 1e-5 * float(before.abs().max()))
        model.backbone.merge("never")
        assert not any(module.folded.has for module in folding)
        assert torch.equal(model(query).logits, before)
    assert folding
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def _fused(model, layout):
    optimizer = torch.optim.AdamW(model.own_parameters().values(), lr=0.1, fused=True)
    training_loss(model, layout).total.backward()
    optimizer.step()


def _without_a_trace(model, layout):
    for weight in model.own_parameters().values():
        weight.data.mul_(1.3)


def _scaled(model, layout):
    for module in model.backbone.shadows.modules():
        if hasattr(module, "lora_A"):
            module.scaling = {name: 3 * scale for name, scale in module.scaling.items()}


@pytest.mark.parametrize("change", [_fused, _without_a_trace, _scaled])
def test_what_was_folded_is_forgotten_however_weights_change(change):
    model, prompt = diffusion_lm(), tokens(2)
    options = {"max_new_tokens": 6, "num_inference_steps": 3, "eos_token_id": None}

    def logits(model):
        seen = []
        model.generate(prompt, observer=lambda evaluation: seen.append(evaluation.logits), **options)
        return torch.cat(seen, 1)

    first = logits(model)
    change(model, supervised(tokens()))
    found = logits(model)
    assert torch.equal(found, logits(copy.deepcopy(model)))
    assert not torch.equal(found, first)


def test_gradients_flow_where_something_is_folded():
    model = diffusion_lm()
    layout = supervised(tokens())
    wanted = own_gradients(model, training_loss(model, layout).total)
    with torch.no_grad():
        model.backbone.merge("always")
    found = own_gradients(model, training_loss(model, layout).total)
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


def test_nothing_is_folded_where_memory_is_short_or_nobody_wants_it(monkeypatch):
    def is_folded(merging, free):
        monkeypatch.setattr("l2d_plugins.backbones.folding._free_memory", lambda device: free)
        model = diffusion_lm()
        model.generate(tokens(1), max_new_tokens=1, num_inference_steps=3, merge=merging)
        return any(module.folded.has for module in model.modules() if hasattr(module, "foldable"))

    assert is_folded("auto", 10**9)
    assert not is_folded("auto", 10**4)
    assert is_folded("always", 10**4)
    assert not is_folded("never", 10**9)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_remembers_no_modulation_but_the_gates(checkpointing):
    model, layout = fresh_lm("llama"), supervised(tokens())
    backbone = two_stream(model)
    backbone.gradient_checkpointing = checkpointing
    whole = {(*layout.tokens[:, 3:].shape, head[-1].out_features) for head in backbone.conditioning.layers}
    kept = []
    gc.collect()  # what other tests have left

    def keep(tensor):
        kept.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = training_loss(model, layout)
    assert loss.total.requires_grad and kept
    assert not {math.prod(shape) for shape in whole} & set(kept)
    # What checkpointing keeps, it keeps by itself.
    with warnings.catch_warnings(action="ignore"):
        assert not whole & {tuple(x.shape) for x in gc.get_objects() if isinstance(x, torch.Tensor)}


@variants
def test_gradient_checkpointing_gives_the_same_gradients_by_computing_twice(variant, monkeypatch):
    found, calls = [], []
    real = checkpoint.checkpoint
    monkeypatch.setattr("l2d_plugins.backbones.two_stream.checkpoint", lambda *a, **k: calls.append(1) or real(*a, **k))
    for saving in (False, True):
        model = diffusion_lm(variant=variant).train()
        two_stream(model).gradient_checkpointing = saving
        found.append(own_gradients(model, training_loss(model, supervised(tokens())).total))
    assert len(calls) == len(two_stream(model).shadows)
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


def with_forwards_of_their_own(lm):
    for module in lm.modules():
        module.forward = MethodType(type(module).forward, module)


def with_hooks_of_accelerate(lm):
    for module in lm.modules():
        add_hook_to_module(module, ModelHook())


def compiled(lm):
    lm.compile(backend="eager")
    lm.get_decoder().compile(backend="eager")


@pytest.mark.parametrize("change", [with_forwards_of_their_own, with_hooks_of_accelerate, compiled])
def test_what_libraries_put_on_modules_changes_no_logit(tiny_lm, change):
    layout = all_known(tokens(), padding=PADDING)
    lm = tiny_lm("llama")
    wanted = diffusion_lm(lm)(ask_everywhere(shared_lm(), layout)).logits
    change(lm)
    model = diffusion_lm(lm)
    torch.testing.assert_close(model(ask_everywhere(model, layout)).logits, wanted)


def test_dropout_of_the_language_model_stays_off_while_the_diffusion_path_trains(tiny_lm):
    model = diffusion_lm(tiny_lm("llama", attention_dropout=0.5)).train()
    assert model.training
    assert not any(module.training for module in model.backbone.lm.modules())
    layout = all_known(tokens())
    query = ask_everywhere(model, layout)
    with torch.no_grad():
        assert torch.equal(model(query).logits, model(query).logits)
        at_zero = model(ask_everywhere(model, layout, t=0.0)).logits
    assert torch.equal(at_zero, plain_logits(model.backbone.lm, layout))


@variants
def test_single_precision_gradients_agree_with_double(variant):
    layout = supervised(tokens())
    single = diffusion_lm(variant=variant)
    double = diffusion_lm(variant=variant).double()
    wanted = own_gradients(single, training_loss(single, layout).total)
    query = ask_everywhere(double, layout)
    from l2d_framework.diffusion.training_noise import NoiseRule, draw

    draws = draw(single, layout, NoiseRule(keys=[(0, 0, row) for row in range(len(PADDING))]))
    targets = layout.tokens.gather(1, draws.positions)
    query = query.replace(x=double.diffuse(targets, draws.t, draws.noise), t=draws.t, positions=draws.positions)
    logits = double.backbone.head(double.features(query))
    assert logits.dtype == torch.float64
    found = own_gradients(double, functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
    for name, gradient in wanted.items():
        if gradient is not None and gradient.any():
            assert (gradient - found[name]).norm() <= 1e-3 * found[name].norm(), name


@families
@variants
def test_half_precision_stays_finite_and_keeps_time_zero_exact(tiny_lm, family, variant):
    model = diffusion_lm(family, variant=variant).bfloat16()
    layout = all_known(tokens(), padding=PADDING)
    with torch.no_grad():
        logits = model(ask_everywhere(model, layout, t=torch.rand(len(PADDING), LENGTH))).logits
        at_zero = model(ask_everywhere(model, layout, t=0.0)).logits
    assert logits[layout.present].isfinite().all()
    assert torch.equal(at_zero[layout.present], plain_logits(model.backbone.lm, layout)[layout.present].float())


@families
@variants
def test_a_path_in_single_precision_trains_over_a_model_in_half(tiny_lm, family, variant):
    model = diffusion_lm(tiny_lm(family).bfloat16(), variant=variant).train()
    assert {weight.dtype for weight in model.own_parameters().values()} == {torch.float32}
    found = own_gradients(model, training_loss(model, supervised(tokens())).total)
    assert all(gradient is None or gradient.isfinite().all() for gradient in found.values())


def test_without_initial_values_the_copies_differ_from_the_language_models_and_nothing_else_does():
    copied, random = fresh_lm(variant="full"), fresh_lm(variant="full_random")
    mine, other = copied.own_parameters(), random.own_parameters()
    assert {n: w.shape for n, w in mine.items()} == {n: w.shape for n, w in other.items()}
    lm = copied.backbone.lm.state_dict()
    for name, weight in mine.items():
        if ".shadow." in name:
            original = lm[name.replace("backbone.shadows", "model.layers").replace(".shadow.", ".")]
            assert torch.equal(weight, original)
            assert not torch.equal(other[name], original)
    layout = all_known(tokens())
    query = ask_everywhere(random, layout)
    with torch.no_grad():
        assert torch.equal(random(query).logits, plain_logits(random.backbone.lm, layout))


def test_only_the_named_targets_are_adapted():
    names = {n.split(".")[-4] for n in fresh_lm(targets=("q_proj", "up_proj")).own_parameters() if "lora_" in n}
    assert names == {"q_proj", "up_proj"}
    everything = {n.split(".")[-4] for n in fresh_lm().own_parameters() if "lora_" in n}
    assert everything == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_lora_starts_as_the_authors_code_does():
    model = fresh_lm(rank=16, alpha=32.0)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            assert not module.lora_B[ADAPTER].weight.any()
            assert module.scaling[ADAPTER] == 2.0
    drawn = torch.cat([w.flatten() for n, w in model.own_parameters().items() if ".lora_A." in n])
    assert float(drawn.detach().std()) == pytest.approx(1 / 16, rel=0.1)


def test_unknown_targets_are_refused_with_those_there_are(tiny_lm):
    with pytest.raises(
        ConfigError, match=r"names \['w1'\], which LlamaDecoderLayer has not. Choose from \['down_proj'"
    ):
        backbone_config(targets=("q_proj", "w1")).build(tiny_lm())
    with pytest.raises(ConfigError, match="which LlamaDecoderLayer has not"):
        backbone_config(targets=()).build(tiny_lm())


@pytest.mark.parametrize("block_size", [2, None])
def test_blocks_of_several_tokens_are_refused(tiny_lm, block_size):
    with pytest.raises(ConfigError, match=f"one token per block; got block_size={block_size}. Set block_size to 1"):
        backbone_config().check(tiny_lm().config, block_size)


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flex_attention"])
def test_attention_kernels_without_explicit_masks_are_refused(tiny_lm, kernel):
    lm = tiny_lm()
    lm.config._attn_implementation = kernel
    with pytest.raises(UnsupportedModelError, match=f"{kernel!r} takes none. Set model.attn_implementation to 'sdpa'"):
        backbone_config().build(lm)


@pytest.mark.parametrize(("family", "name"), [("gpt2", "GPT2LMHeadModel"), ("gptj", "GPTJ")])
def test_families_that_are_built_otherwise_are_refused_by_name(tiny_lm, family, name):
    with pytest.raises(UnsupportedModelError, match=rf"cannot (serve|modulate) {name}.*[Uu]se|Choose a model"):
        backbone_config().build(tiny_lm(family))


class LooksPastTheCache(LlamaAttention):
    """Attends to the keys it made itself, as a family with fused attention might."""

    def forward(self, hidden_states, *args, **kwargs):
        caches = {name: kwargs.pop(name) for name in list(kwargs) if hasattr(kwargs[name], "update")}
        out = super().forward(hidden_states, *args, **dict.fromkeys(caches), **kwargs)
        for cache in caches.values():
            shape = (len(hidden_states), 2, hidden_states.shape[1], 8)
            cache.update(torch.zeros(shape), torch.zeros(shape), self.layer_idx)
        return out


def looks_past_the_cache(lm):
    attention = LooksPastTheCache(lm.config, 1).eval()
    attention.load_state_dict(lm.model.layers[1].self_attn.state_dict())
    lm.model.layers[1].self_attn = attention
    return lm


def test_a_model_whose_layers_cannot_be_replayed_is_refused_by_name(tiny_lm):
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM: layer 1 replayed .* is off by \d"):
        backbone_config().build(looks_past_the_cache(tiny_lm()))


def refusal(lm):
    with pytest.raises(UnsupportedModelError) as caught:
        backbone_config().build(lm)
    return str(caught.value)


def raises_type_error(lm):
    def forward(hidden_states, position_embeddings, cache_of_next_year):
        raise AssertionError

    lm.model.layers[0].forward = forward
    return lm


def knows_no_such_argument(lm):
    def forward(input_ids):
        raise AssertionError

    lm.model.forward = forward
    return lm


def lost_its_layers(lm):
    lm.model.blocks = lm.model._modules.pop("layers")
    return lm


def lost_a_norm(lm):
    lm.model.layers[0].input_layernorm = torch.nn.Identity()
    return lm


BROKEN = [
    (looks_past_the_cache, "layer 1 replayed"),
    (raises_type_error, "unexpected keyword argument"),
    (knows_no_such_argument, "unexpected keyword argument"),
    (lost_its_layers, "found layers: False"),
    (lost_a_norm, "0 attention and 1 MLP branches"),
]


@pytest.mark.parametrize(("change", "failed"), BROKEN)
@pytest.mark.parametrize("installed", ["5.16.2", "5.24.1", "5.31.0.dev0"])
def test_a_served_family_that_fails_blames_the_installed_release(tiny_lm, monkeypatch, change, failed, installed):
    monkeypatch.setattr("transformers.__version__", installed)
    message = refusal(change(tiny_lm()))
    assert failed in message
    assert f"'llama' is served with transformers 5.17.0 to 5.24.0; {installed} is installed" in message
    assert "another family" not in message
    tested = installed.startswith("5.24")
    assert message.endswith("Load it unchanged." if tested else "Run: pip install 'transformers>=5.17.0,<=5.24.0'")


def test_a_family_that_is_not_served_is_never_told_to_choose_itself():
    assert "gemma2" in advice("gemma3", PROVEN)
    assert "gemma3" not in advice("gemma3", PROVEN)
    assert "is installed" not in advice("gpt2", PROVEN)


def test_the_tested_releases_are_those_of_the_requirement_and_of_the_constraints(repository):
    lines = (repository / "constraints.txt").read_text().splitlines()
    newest = Version(next(line for line in lines if line.startswith("transformers==")).partition("==")[2])
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    floor = next(line for line in project["dependencies"] if line.startswith("transformers>="))
    assert Version(TESTED[0]) == Version(floor.partition(">=")[2])
    assert newest <= Version(TESTED[1])


def test_an_encoder_decoder_is_refused():
    from transformers import T5Config

    with pytest.raises(UnsupportedModelError, match="'t5' is an encoder-decoder"):
        backbone_config().check(T5Config(), 1)


@families
def test_the_number_of_own_weights_is_known_without_storage(tiny_lm, family):
    from l2d_framework.base_model import empty_language_model

    lm = tiny_lm(family)
    empty = empty_language_model(lm.config, lm.config._attn_implementation)
    for variant in ("lora", "full"):
        shapes = {n: w.shape for n, w in fresh_lm(lm, variant=variant).own_parameters().items()}
        model = fresh_lm(empty, variant=variant)
        assert {n: w.shape for n, w in model.own_parameters().items()} == shapes
