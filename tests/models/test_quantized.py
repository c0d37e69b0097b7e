"""Bases with quantized weights: served frozen as they are, trained through, never trained; the rest refused by name."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
from diffusion_models import NETWORK, SPACE, moved, own_gradients, random_tokens, supervised, training_loss
from tiny_models import tiny_lm, tiny_tokenizer
from tiny_runs import diffusion_run, language_model_run, losses, tess_run, write_base, write_sums
from torch import nn
from transformers import AutoModelForCausalLM

from l2d_framework.base_model import check_quantization, fingerprint, load_language_model
from l2d_framework.config import ModelSection, check_run, parse_run
from l2d_framework.errors import ConfigError
from l2d_framework.models.checkpoint import build_model, load, save
from l2d_framework.training.run import train_runs
from l2d_plugins.backbones.shadow import is_quantized, unpacked

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
PROMPT = torch.tensor([[40, 41, 42, 43]])


def write_int8(folder, family="llama", *, with_embeddings=False):
    """Folder with a language model in torchao's 8-bit weights."""
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from transformers import TorchAoConfig

    tiny_lm(family).save_pretrained(folder / "plain")
    table = FqnToConfig({"model.embed_tokens": IntxWeightOnlyConfig(torch.int8)})
    kind = table if with_embeddings else Int8WeightOnlyConfig()
    quantization = TorchAoConfig(kind, include_input_output_embeddings=with_embeddings)
    lm = AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=quantization)
    lm.save_pretrained(folder / "int8")
    tiny_tokenizer(chat=True).save_pretrained(folder / "int8")
    return folder / "int8"


@pytest.fixture
def int8(tmp_path):
    return write_int8(tmp_path)


def diffusion(base, *, dtype="auto", **backbone):
    """L2D over a base, as if trained."""
    run = {
        "model": {"base": str(base), "dtype": dtype},
        "schedule": {"name": "linear"},
        "parametrization": {"name": "embedding", **SPACE},
        "backbone": {"name": "two_stream", **NETWORK, **backbone},
    }
    return moved(build_model(parse_run(run)).eval())


def text(model, steps):
    return model.generate(PROMPT, num_inference_steps=steps, max_new_tokens=12, eos_token_id=None, seed=1).answers


def dequantized(base, dtype=torch.float32):
    """The same language model with its weights as ordinary matrices."""
    lm = AutoModelForCausalLM.from_pretrained(base)
    plain = tiny_lm(lm.config.model_type)
    state = {
        name: weight.dequantize() if "torchao" in type(weight).__module__ else weight
        for name, weight in lm.state_dict().items()
    }
    plain.load_state_dict(state)
    return plain.to(dtype)


@needs_torchao
@pytest.mark.parametrize("variant", ["lora", "full", "full_random"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_at_zero_the_text_is_that_of_the_quantized_model(tmp_path, family, variant):
    base = write_int8(tmp_path, family)
    lm = AutoModelForCausalLM.from_pretrained(base)
    wanted = lm.generate(PROMPT, max_new_tokens=12, do_sample=False, eos_token_id=None)[:, PROMPT.shape[1] :]
    model = diffusion(base, variant=variant)
    assert torch.equal(text(model, 0), wanted)
    assert not torch.equal(text(model, 3), wanted)
    assert any(is_quantized(module) for module in model.backbone.lm.modules())


@needs_torchao
@pytest.mark.parametrize("variant", ["lora", "full"])
def test_what_a_diffusion_path_learns_over_quantized_weights_is_what_it_learns_over_their_values(
    int8, tmp_path, variant
):
    plain = dequantized(int8)
    plain.save_pretrained(tmp_path / "dense")
    found, wanted = (diffusion(base, variant=variant) for base in (int8, tmp_path / "dense"))
    tokens = random_tokens(2, 9)
    gradients = [own_gradients(model, training_loss(model, supervised(tokens)).total) for model in (found, wanted)]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        # What is added to w(t) at every time alike has no effect.
        assert name.endswith("final.2.bias") or gradient.abs().sum() > 0, name
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=2e-5), name


@needs_torchao
@pytest.mark.parametrize("variant", ["lora", "full"])
def test_own_weights_over_a_quantized_base_are_ordinary_matrices(int8, variant):
    model = diffusion(int8, variant=variant)
    assert {(type(weight), weight.dtype) for weight in model.own_parameters().values()} == {
        (nn.Parameter, torch.float32)
    }


@needs_torchao
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_model_over_a_quantized_base_is_saved_and_loaded_with_equal_text(int8, tmp_path, dtype):
    model = diffusion(int8, dtype=dtype)
    save(model, tmp_path / "out")
    assert not (tmp_path / "out" / "language_model").exists()
    assert torch.equal(text(load(tmp_path / "out"), 3), text(model, 3))


@needs_torchao
@pytest.mark.parametrize("variant", ["lora", "full"])
def test_merging_over_a_quantized_base_changes_no_text_and_keeps_it_quantized(int8, variant):
    model = diffusion(int8, variant=variant)
    wanted = text(model, 3)
    before = sum(is_quantized(module) for module in model.backbone.modules())
    model.backbone.merge()
    assert torch.equal(text(model, 3), wanted)
    assert sum(is_quantized(module) for module in model.backbone.modules()) == before > 0


@needs_torchao
def test_the_fingerprint_tells_quantized_weights_from_those_they_came_from(int8, tmp_path):
    assert fingerprint(ModelSection(base=str(int8))) != fingerprint(ModelSection(base=str(tmp_path / "plain")))


@needs_torchao
def test_l2d_trains_over_a_quantized_base(int8, tmp_path):
    data = write_sums(tmp_path / "sums.jsonl")
    train_runs([parse_run(diffusion_run(int8, data, tmp_path / "out"))])
    measured = losses(tmp_path / "out")
    assert measured[9]["eval_loss"] < measured[3]["eval_loss"]
    assert load(tmp_path / "out").generate(PROMPT, num_inference_steps=3, max_new_tokens=3).answers.shape[0] == 1


@needs_torchao
def test_a_lora_trains_over_a_quantized_base_and_stands_for_it(int8, tmp_path):
    data = write_sums(tmp_path / "sums.jsonl")
    run = language_model_run(data, tmp_path / "lora", model={"base": str(int8)}, lora={"rank": 2})
    train_runs([parse_run(run)])
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    assert text(diffusion(tmp_path / "lora"), 3).shape == (1, 12)


@needs_torchao
def test_what_would_train_quantized_weights_is_refused_before_they_load(int8, tmp_path, monkeypatch):
    data = write_sums(tmp_path / "sums.jsonl")
    tess = parse_run(tess_run(int8, data, tmp_path / "out"))
    plain = parse_run(language_model_run(data, tmp_path / "out", model={"base": str(int8)}))
    for run in (tess, plain):
        with pytest.raises(ConfigError, match="quantized with 'torchao', and quantized weights cannot be trained"):
            check_run(run)
    with pytest.raises(ConfigError, match="quantized weights cannot be trained"):
        build_model(tess)


@needs_torchao
def test_a_quantization_through_which_no_gradient_passes_is_refused_for_training(int8, monkeypatch):
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    run = parse_run(diffusion_run(int8, int8, int8 / "out"))
    check_run(run)
    monkeypatch.setattr(TorchAoHfQuantizer, "is_trainable", False)
    with pytest.raises(ConfigError, match="'torchao' in a way through which no gradient passes"):
        check_run(run)


@needs_torchao
def test_a_quantized_embedding_table_is_refused(tmp_path):
    base = write_int8(tmp_path, with_embeddings=True)
    with pytest.raises(ConfigError, match="has a quantized embedding table"):
        load_language_model(ModelSection(base=str(base)))


@needs_torchao
def test_a_quantized_base_without_its_package_is_refused(int8, monkeypatch):
    monkeypatch.setattr("transformers.quantizers.quantizer_torchao.is_torchao_available", lambda: False)
    with pytest.raises(
        ConfigError, match=r"is quantized with 'torchao', which cannot be read here: .*pip install torchao"
    ):
        check_run(parse_run(diffusion_run(int8, int8, int8 / "out")))


METHODS = {
    "bitsandbytes": ("bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "bitsandbytes ": ("bitsandbytes", {"load_in_8bit": True}),
    "gptq": ("optimum", {"bits": 4, "group_size": 128, "desc_act": False}),
    "awq": ("gptqmodel", {"bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}),
    "compressed-tensors": ("compressed_tensors", {"format": "int-quantized", "config_groups": {}}),
    "hqq": ("hqq", {"quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}}),
    "quanto": ("optimum", {"weights": "int8"}),
    "aqlm": ("aqlm", {}),
    "no-such-method": ("nothing", {}),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_whose_package_is_missing_is_refused_by_name_before_weights_load(tmp_path, method, monkeypatch):
    package, fields = METHODS[method]
    method = method.strip()
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    base = write_base(tmp_path / "base")
    file = base / "config.json"
    section = {"quant_method": method, **fields}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": section}))
    monkeypatch.setattr(
        "l2d_framework.models.checkpoint.load_language_model", lambda *_: pytest.fail("weights were loaded")
    )
    says = rf"model.base: .*base' is quantized with '{method}', which cannot be read here"
    run = parse_run(diffusion_run(base, base, base / "out"))
    for refused in (lambda: check_run(run), lambda: build_model(run)):
        with pytest.raises(ConfigError, match=says) as caught:
            refused()
        assert method == "no-such-method" or "pip install" in str(caught.value)


@pytest.mark.parametrize("section", [3, "int8", [], {}, {"quant_method": None}, {"quant_method": 5}])
def test_a_damaged_quantization_section_is_refused(section):
    with pytest.raises(ConfigError, match="is quantized with"):
        check_quantization(SimpleNamespace(quantization_config=section), "base")


class HalfPacked(nn.Module):
    """A projection of a library of its own: its weights are integers in a buffer, its bias is a buffer."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", (linear.weight / 0.01).round().to(torch.int32))
        self.register_buffer("bias", linear.bias)

    def forward(self, x):
        return nn.functional.linear(x, self.packed.to(x.dtype) * 0.01, self.bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_projection_unpacked_does_what_it_did_packed(bias, dtype):
    linear = nn.Linear(1500, 40, bias=bias)
    if bias:
        linear.bias.data.mul_(1000)
    packed = HalfPacked(linear).to(dtype)
    plain = unpacked(packed, dtype)
    assert torch.equal(plain.weight, packed.packed.to(dtype) * 0.01)
    x = torch.randn(3, 1500, dtype=dtype)
    assert torch.equal(plain(x), packed(x))
    assert packed.bias is (linear.bias if linear.bias is None else packed._buffers["bias"])
