"""What comes with a model is read and never run, and what cannot be read is named."""

import contextlib
import io
import json
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from diffusion_models import SPACE, tess_lm
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import tiny_lm, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, LlamaConfig
from typer.testing import CliRunner

from l2d_bench.measures.rewards import RewardMeasure
from l2d_framework.base_model import fingerprint, load_config, load_language_model, load_tokenizer
from l2d_framework.cli import app
from l2d_framework.config import check_runs, parse_run
from l2d_framework.errors import CheckpointError, L2DError
from l2d_framework.evaluation.text.judge import open_tokenizer, pretrained
from l2d_framework.models.checkpoint import build_model, load, load_weights, save
from l2d_framework.models.convert import convert
from l2d_framework.models.manifest import file_hash, sealed
from l2d_framework.models.unloaded import UnloadedModel
from l2d_framework.opening import found_from, new_model, open_adapter, open_config, open_model
from l2d_framework.training.reward.run import load_reward_model as reward_base
from l2d_plugins.drafters import assistant_network
from l2d_plugins.guidance import reward_network

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 1, "head_dim": 8}
CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")


@pytest.fixture
def model(tmp_path):
    """A small base model."""
    tiny_lm(**SMALL).save_pretrained(tmp_path / "base")
    tiny_tokenizer(chat=True).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def nothing_run(tmp_path, monkeypatch):
    """Checks that no planted code has run, no kernel was asked for, and nobody was asked, whose answer would be yes."""
    asked = io.StringIO("y\n" * 99)
    kernels = []
    monkeypatch.setattr(sys, "stdin", asked)
    monkeypatch.setattr(transformers.modeling_utils, "lazy_import_flash_attention", lambda *a, **k: kernels.append(a))
    yield
    assert not (tmp_path / "it-ran").exists()
    assert asked.tell() == 0
    assert not kernels


def edit(file, **changes):
    fields = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(fields | changes))


def plant_code(folder, marker):
    """Files that run when they are imported."""
    run = f"open({str(marker)!r}, 'w').close()\n"
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(run + "def generate(model, **_): return None\n")
    (folder / "evil.py").write_text(
        run
        + "import transformers as t\n"
        + "class Config(t.LlamaConfig): model_type = 'evil'\n"
        + "class Model(t.LlamaForCausalLM): config_class = Config\n"
        + "class Tokenizer(t.PreTrainedTokenizerFast): pass\n"
    )


def unknown_model(folder):
    places = {name: "evil.Config" if name == "AutoConfig" else "evil.Model" for name in CLASSES}
    edit(folder / "config.json", model_type="evil", auto_map=places)


def known_model(folder):
    edit(folder / "config.json", auto_map=dict.fromkeys(CLASSES, "evil.Model"))
    edit(folder / "generation_config.json", custom_generate="custom_generate/generate.py", trust_remote_code=True)


def tokenizer(folder):
    places = {"AutoTokenizer": [None, "evil.Tokenizer"]}
    edit(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=places)


def model_and_tokenizer(folder):
    unknown_model(folder)
    tokenizer(folder)


def kernel(folder):
    edit(folder / "config.json", _attn_implementation="evil/kernel")


def flash(folder):
    """Without its package, transformers takes it from a kernel of the hub."""
    edit(folder / "config.json", _attn_implementation="flash_attention_2", attn_implementation="flash_attention_3")


def reseal(folder):
    """Hash the files of a checkpoint again, as somebody does who wants it to be opened."""
    fields = json.loads((folder / "l2d.json").read_text())
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"l2d.json", "README.md"}
    fields["files"] = {name: file_hash(folder / name) for name in names}
    (folder / "l2d.json").write_text(json.dumps(sealed(fields)))


def diffusion(base, **fields):
    parts = {"schedule": {"name": "linear"}, "parametrization": {"name": "embedding", **SPACE}}
    parts |= {"backbone": {"name": "two_stream", "rank": 2}, "model": {"base": str(base)}}
    return parse_run(parts | fields)


def place_base(base, plant):
    plant(base)
    run = diffusion(base)
    yield from (lambda f=f: f(run.model) for f in (load_config, load_language_model, load_tokenizer))
    yield lambda: check_runs([run])
    yield lambda: build_model(run)
    yield lambda: UnloadedModel(str(base), base=None, dtype=None, revision=None)
    yield lambda: reward_base(parse_run({"kind": "reward", "model": {"base": str(base)}}), tiny_tokenizer())


def write_adapter(folder):
    adapted = get_peft_model(tiny_lm(**SMALL), LoraConfig(r=2, target_modules=["q_proj"]))
    # Left to itself, peft looks for the embedding table's size in a folder that this model never had.
    adapted.save_pretrained(folder, save_embedding_layers=False)


def place_adapter(base, plant):
    folder = base.parent / "adapter"
    write_adapter(folder)
    edit(folder / "adapter_config.json", base_model_name_or_path=str(base))
    tiny_tokenizer().save_pretrained(folder)
    plant(base)
    # A config of its own makes it a model folder to transformers.
    (folder / "config.json").write_text((base / "config.json").read_text())
    plant(folder)
    run = diffusion(base, model={"base": str(base), "adapter": str(folder)})
    yield from (lambda f=f: f(run.model) for f in (load_config, load_language_model, load_tokenizer))
    yield lambda: check_runs([run])
    yield lambda: open_adapter(tiny_lm(**SMALL), folder)
    (folder / "config.json").unlink()
    yield from (lambda f=f: f(diffusion(folder).model) for f in (load_config, load_language_model, load_tokenizer))


def place_checkpoint(base, plant):
    folder = base.parent / "tess"
    save(tess_lm(tiny_lm(**SMALL), tokenizer=True), folder)
    plant(folder / "language_model")
    reseal(folder)
    yield lambda: load(folder)
    yield lambda: load_weights(tess_lm(tiny_lm(**SMALL)), folder)
    yield lambda: UnloadedModel(str(folder), base=None, dtype=None, revision=None)
    yield lambda: open_tokenizer(str(folder))
    yield lambda: fail(CliRunner().invoke(app, ["generate", str(folder), "-p", "a", "--max-new-tokens", "1"]))


def place_reward_model(base, plant):
    folder = base.parent / "reward"
    AutoModelForSequenceClassification.from_config(LlamaConfig(vocab_size=260, num_labels=1, **SMALL)).save_pretrained(
        folder
    )
    tiny_tokenizer().save_pretrained(folder)
    plant(folder)
    yield lambda: reward_network.check_reward_model(str(folder), tiny_tokenizer(), needs_end=False)
    yield lambda: reward_network.load_reward_model(str(folder), torch.device("cpu"), torch.float32)
    measure = RewardMeasure(data="a", model=str(folder), canvas=8)
    lm = SimpleNamespace(device="cpu", ends=lambda is_chat: ())
    answerer = SimpleNamespace(lm=lm, tokenizer=tiny_tokenizer(), batch_size=1)
    yield lambda: measure._rewards(str(folder), answerer, ["a"], [SimpleNamespace(text="b", ids=[5])])


def place_assistant(base, plant):
    plant(base)
    yield lambda: assistant_network.check_assistant(str(base), tiny_tokenizer())
    yield lambda: assistant_network.load_assistant(str(base), torch.device("cpu"), torch.float32)


def place_judge(base, plant):
    plant(base)
    for causal in (True, False):
        yield lambda causal=causal: pretrained(str(base), causal=causal, device="cpu", dtype="float32").model
    yield lambda: open_tokenizer(str(base))
    (base.parent / "texts.jsonl").write_text('{"text": "a text"}\n')
    arguments = ["eval-text", str(base.parent / "texts.jsonl"), "--perplexity-model", str(base), "--tokenizer"]
    yield lambda: fail(CliRunner().invoke(app, [*arguments, str(base)]))


def place_source(base, plant):
    lm = tiny_lm(**SMALL)
    state = lm.state_dict() | {"timestep_embed.weight": torch.randn(lm.config.hidden_size, 1)}
    (base / "model.safetensors").unlink()
    torch.save(state, base / "pytorch_model.bin")
    plant(base)
    yield lambda: convert(str(base), base.parent / "tess2", reader="tess2", base=None)
    torch.save(lm.state_dict() | {"score.weight": torch.randn(1, lm.config.hidden_size)}, base / "pytorch_model.bin")
    yield lambda: convert(str(base), base.parent / "rm", reader="tess2-reward", base=None)


def fail(result):
    """The error of a command, which it has printed."""
    if isinstance(result.exception, SystemExit) and result.exit_code:
        raise L2DError(result.output)
    if result.exception is not None:
        raise result.exception


PLACES = [place_base, place_adapter, place_checkpoint, place_reward_model, place_assistant, place_judge, place_source]
PLANTS = [unknown_model, known_model, tokenizer, model_and_tokenizer, kernel, flash]


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("place", PLACES)
def test_code_that_comes_with_a_model_is_never_run(model, tmp_path, nothing_run, place, plant):
    def planting(folder):
        plant_code(folder, tmp_path / "it-ran")
        plant(folder)

    refused = 0
    for ask in place(model, planting):
        try:
            ask()
        except L2DError:
            refused += 1
    # Without the code there is no such model; others are what transformers itself makes of them.
    assert refused > 0 or plant not in (unknown_model, kernel)


def test_the_planted_code_would_run(model, tmp_path, monkeypatch):
    plant_code(model, tmp_path / "it-ran")
    unknown_model(model)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with contextlib.suppress(Exception):
        transformers.AutoConfig.from_pretrained(model)
    assert (tmp_path / "it-ran").exists()


def test_a_model_that_needs_its_own_code_is_refused_with_the_reason(model, tmp_path):
    unknown_model(model)
    with pytest.raises(L2DError, match="without running code that comes with it, which l2d-framework never"):
        load_config(diffusion(model).model)
    kernel(model)
    edit(model / "config.json", model_type="llama")
    with pytest.raises(L2DError, match="asks for the attention kernel 'evil/kernel'"):
        load_config(diffusion(model).model)


def test_an_adapter_that_names_a_module_to_import_is_refused(model):
    folder = model.parent / "adapter"
    write_adapter(folder)
    edit(folder / "adapter_config.json", base_model_name_or_path="a", megatron_config={"a": 1}, megatron_core="evil")
    with pytest.raises(CheckpointError, match="names the module 'evil' to import"):
        open_adapter(tiny_lm(**SMALL), folder)
    shutil.copy(folder / "adapter_config.json", model)
    with pytest.raises(CheckpointError, match="names the module 'evil' to import"):
        load_language_model(diffusion(model).model)


def test_generation_takes_no_code(model, tmp_path, nothing_run):
    plant_code(model, tmp_path / "it-ran")
    lm = build_model(diffusion(model))
    with pytest.raises(L2DError, match="custom_generate"):
        lm.generate("a", max_new_tokens=1, custom_generate=str(model), trust_remote_code=True)


def test_everything_is_opened_through_the_one_door(repository):
    other = re.compile(
        r"(?<!Quantizer)\.(from_pretrained|_?from_config|for_model|load_custom_generate)\(|trust_remote_code *="
    )
    files = [path for top in ("l2d_framework", "plugins", "bench") for path in (repository / top).rglob("*.py")]
    assert len(files) > 100
    found = {str(path) for path in files if other.search(path.read_text(encoding="utf-8"))}
    assert {Path(path).name for path in found} == {"opening.py"}


def truncated(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def binary(file):
    file.write_bytes(b"\xff\xfe\x00\x80" * 9)


def of_another_type(file):
    file.write_text("[1]")


def folder(file):
    file.unlink()
    file.mkdir()


def loop(file):
    file.unlink()
    file.symlink_to(file)


CONTENT, PLACE = [truncated, binary, of_another_type], [folder, loop]


@pytest.mark.parametrize(
    ("name", "ask", "damages"),
    [
        ("config.json", load_config, CONTENT + PLACE),
        ("model.safetensors", fingerprint, CONTENT + PLACE),
        ("tokenizer.json", load_tokenizer, CONTENT + PLACE),
        ("tokenizer_config.json", load_tokenizer, CONTENT),
    ],
)
def test_a_damaged_file_of_a_base_model_is_named(model, name, ask, damages):
    whole = (model / name).read_bytes()
    for damage in damages:
        damage(model / name)
        with pytest.raises(L2DError, match=name):
            ask(diffusion(model).model)
        (model / name).rmdir() if (model / name).is_dir() else (model / name).unlink()
        (model / name).write_bytes(whole)
    ask(diffusion(model).model)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "nonsense"},
        {"num_attention_heads": 0},
        {"rope_parameters": {"rope_type": "nonsense"}},
        {"hidden_size": -1},
        {"vocab_size": "many"},
        {"num_hidden_layers": 10**6, "layer_types": 3},
        {"model_type": 5},
    ],
)
def test_a_config_that_describes_no_model_is_one_error(model, changes):
    edit(model / "config.json", **changes)
    with pytest.raises(L2DError):
        check_runs([diffusion(model)])
    with pytest.raises(L2DError):
        build_model(diffusion(model))


def test_weights_that_are_a_program_are_named_and_not_run(model, tmp_path, nothing_run):
    class Program:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "it-ran",))

    torch.save(load_file(model / "model.safetensors") | {"a": Program()}, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(L2DError, match="weights"):
        load_language_model(diffusion(model).model)
    with pytest.raises(L2DError, match=r"pytorch_model\.bin"):
        fingerprint(diffusion(model).model)


def test_what_is_not_there_is_not_said_to_be_damaged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="There is no such folder here") as caught:
        open_config("moved-away")
    assert "damaged" not in str(caught.value)


def test_a_place_that_may_not_be_looked_into_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").touch()
    plain = Path.is_dir

    def is_dir(path: Path) -> bool:
        if path.is_relative_to("/closed"):
            raise PermissionError(13, "Permission denied")
        return plain(path)

    monkeypatch.setattr(Path, "is_dir", is_dir)
    assert found_from("x", ["/closed", tmp_path]) == str(tmp_path / "x")
    assert found_from("x", ["/closed"]) == "x"


def test_an_adapter_is_put_on_its_base_wherever_it_is_opened_from(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, tokens = tmp_path / "adapter", torch.arange(5)[None]
    adapted = get_peft_model(tiny_lm(**SMALL), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(adapter, save_embedding_layers=False)
    edit(adapter / "adapter_config.json", base_model_name_or_path="base")
    (adapter / "run.json").write_text(json.dumps({"trained_in": str(tmp_path)}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    plain = open_model(transformers.AutoModelForCausalLM, model)[0]
    with torch.no_grad():
        found = open_model(transformers.AutoModelForCausalLM, adapter)[0](tokens).logits
        assert not torch.allclose(found, plain(tokens).logits)
        assert torch.equal(found, open_adapter(plain, adapter)(tokens).logits)


def test_models_are_made_one_at_a_time_as_transformers_cannot_make_two() -> None:
    met, both = [], threading.Barrier(2)

    class Kind:
        """Waits a moment for another thread to be making a model as well."""

        @staticmethod
        def from_config(*_: object, **options: object) -> tuple[None, None]:
            with contextlib.suppress(threading.BrokenBarrierError):
                met.append(both.wait(0.5))
            both.reset()
            return None, None

        from_pretrained = from_config

    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(new_model, Kind, LlamaConfig()), pool.submit(open_model, Kind, None, config=LlamaConfig())]
    assert [one.exception() for one in made] == [None, None]
    assert not met


def test_weights_stay_tied_whatever_threads_have_loaded(tmp_path: Path) -> None:
    tiny_lm("gemma2").save_pretrained(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: open_model(transformers.AutoModelForCausalLM, tmp_path)[0], range(12)))
    for lm in (*made, tiny_lm("gemma2")):
        assert lm.get_input_embeddings().weight is lm.get_output_embeddings().weight
