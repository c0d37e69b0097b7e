"""The protocols' draws: from the model's whole distribution, whatever its base ships as generation defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import tiny_lm, tiny_tokenizer

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from l2d_bench import protocols
from l2d_framework.evaluation.harness.model import L2DLM

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

FILES = [
    file
    for folder in ("l2d", "tiny")
    for file in sorted((protocols.folder() / folder).rglob("*"))
    if file.is_file() and "do_sample: true" in file.read_text(encoding="utf-8")
]


def _kwargs(file: Path) -> dict[str, Any]:
    plain = [line for line in file.read_text(encoding="utf-8").splitlines() if "!function" not in line]
    return dict(yaml.safe_load("\n".join(plain))["generation_kwargs"])


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_defaults_of_the_base_change_no_answer(file, tmp_path):
    generation = {**_kwargs(file), "max_gen_toks": 4}
    answers = []
    for name, defaults in (("plain", {}), ("chat", {"top_k": 1, "top_p": 0.1, "repetition_penalty": 3.0})):
        lm = tiny_lm("llama", max_position_embeddings=256)
        lm.generation_config.update(do_sample=True, **defaults)
        for part in (lm, tiny_tokenizer()):
            part.save_pretrained(tmp_path / name)
        model = L2DLM(str(tmp_path / name), device="cpu", num_inference_steps=0)
        requests = [Instance("generate_until", {}, ("2+2=", generation), number) for number in range(20)]
        answers.append(model.generate_until(requests, disable_tqdm=True))
    assert answers[0] == answers[1]
    assert (generation["temperature"], generation["top_k"], generation["top_p"]) == (1.0, 0, 1.0)


def test_there_are_such_protocols():
    assert len(FILES) == 6
