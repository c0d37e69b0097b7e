"""`l2d params` over the shapes of the public models that the L2D paper used."""

import json
import re

import pytest
import yaml
from diffusion_models import fresh_lm
from typer.testing import CliRunner

from l2d_framework.cli import app
from l2d_framework.cli.config import count_by_module

LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
QWEN = {"model_type": "qwen2", "max_position_embeddings": 32768}
SHAPES = {
    "Llama 3.2 1B": {
        **LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "Qwen 2.5 1.5B": {
        **QWEN,
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "Llama 3.1 8B": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "Qwen 2.5 7B": {
        **QWEN,
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}

TOTALS = [
    ("Llama 3.2 1B", "lora", 73_344_256),
    ("Qwen 2.5 1.5B", "lora", 103_324_928),
    ("Llama 3.1 8B", "lora", 281_036_032),
    ("Qwen 2.5 7B", "lora", 233_008_384),
    ("Llama 3.2 1B", "full", 992_945_408),
]


@pytest.mark.parametrize(("name", "variant", "total"), TOTALS)
def test_trainable_parameters_are_those_of_the_paper(tmp_path, name, variant, total):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[name]))
    run = {
        "model": {"base": str(tmp_path)},
        "schedule": {"name": "linear"},
        "parametrization": {"name": "embedding"},
        "backbone": {"name": "two_stream", "variant": variant},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    found = CliRunner().invoke(app, ["params", str(tmp_path / "run.yaml")], catch_exceptions=False)
    assert found.exit_code == 0
    counts = [int(number.replace(",", "")) for number in re.findall(r"(\d[\d,]+) *$", found.stdout, re.MULTILINE)]
    assert counts[-1] == total
    assert sum(counts[:-1]) == total


def test_every_own_weight_is_counted_once():
    model = fresh_lm(classes=("a", "b"))
    assert sum(count_by_module(model).values()) == sum(w.numel() for w in model.own_parameters().values())
