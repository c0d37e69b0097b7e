"""What every test may ask for: folders of reference data, tiny language models, tiny tokenizers."""

import gc
import json
import logging
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

# Before any library reads them. A test never reaches the network, and never reads or writes the user's caches.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
    HF_HOME=tempfile.mkdtemp(prefix="l2d-tests-"),
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("L2D_PLUGINS", None)
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels, where it is installed, then run on the CPU

import shared_folders
import torch
import torch.utils.collect_env
from safetensors.torch import load_file, save_file
from tiny_models import tiny_lm as build_lm
from tiny_models import tiny_tokenizer as build_tokenizer

from l2d_framework.generation import speculation

# Shells start what is to run in the background with this signal ignored, which tests send themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)


# lm_eval asks it in every evaluation, and it asks pip and compilers.
torch.utils.collect_env.get_pretty_env_info = cache(torch.utils.collect_env.get_pretty_env_info)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


def pytest_collection_finish() -> None:
    # Millions of objects of libraries and tests live to the end; looking through them again and again takes minutes.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


BEFORE_OTHERS = {
    "test_trainer_processes.py",
    "test_start_up.py",
    "test_demo.py",
    "test_smollm2_profile.py",
    "test_own_profiles.py",
    "test_offline_tasks.py",
    "test_meter.py",
}
"""Files with tests or fixtures of ten seconds and more: at the end, one worker would wait for the other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in BEFORE_OTHERS)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _loggers_as_before() -> Iterator[None]:
    """A command run inside a test quietens loggers for its process, which other tests listen to."""
    loggers = [logging.getLogger(name) for name in ("l2d_framework", "lm_eval", "lm_eval.evaluator")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def _passes_of_no_machine() -> Iterator[None]:
    """`speculate: auto` measures passes, and no test may depend on what those take here and now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculation, "pass_times", lambda backbone, sizes: [3 + size / sizes[0] for size in sizes])
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the repository."""
    return shared_folders.REPOSITORY


def _shared(variable: str, name: str) -> Path:
    folder = shared_folders.find(variable, name)
    if folder is None:
        pytest.skip(f"{variable} is unset and there is no ../shared/{name}")
    return folder


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of reference numbers, at least the small one here; fails if L2D_GOLDEN_DIR points nowhere."""
    return _shared("L2D_GOLDEN_DIR", "golden")


@pytest.fixture(scope="session")
def golden_file(golden_dir: Path) -> Callable[[str], Path]:
    """`golden_file("tess/masks.json")`: a file of reference numbers; skips where the folder has no such file."""
    return partial(shared_folders.existing, golden_dir)


@pytest.fixture(scope="session")
def datasets_dir() -> Path:
    """Folder of data sets laid out as on the Hub; fails if L2D_DATASETS_DIR points nowhere, skips if there is none."""
    return _shared("L2D_DATASETS_DIR", "datasets")


@pytest.fixture(scope="session")
def real_model() -> Path:
    """Folder of SmolLM2-135M-Instruct; fails if L2D_REAL_MODEL points nowhere, skips if it is unset."""
    if not os.environ.get("L2D_REAL_MODEL"):
        pytest.skip("L2D_REAL_MODEL is unset: it names a folder with SmolLM2-135M-Instruct")
    return shared_folders.find("L2D_REAL_MODEL", "")


@pytest.fixture(scope="session")
def shallow_model(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the real model's first two layers, with all of its vocabulary, tokenizer and settings."""
    folder = tmp_path_factory.mktemp("shallow")
    weights = load_file(real_model / "model.safetensors")
    layers = {name: re.match(r"model\.layers\.(\d+)\.", name) for name in weights}
    first = {name: weights[name] for name, layer in layers.items() if layer is None or int(layer[1]) < 2}
    for file in real_model.iterdir():
        if file.name == "config.json":
            config = json.loads(file.read_text(encoding="utf-8")) | {"num_hidden_layers": 2}
            (folder / file.name).write_text(json.dumps(config), encoding="utf-8")
        elif file.suffix != ".safetensors":
            (folder / file.name).symlink_to(file.resolve())
    save_file(first, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def tiny_lm() -> Callable[..., Any]:
    """`tiny_lm(family="llama", seed=0, **config)`: a random causal language model of a transformers family."""
    return build_lm


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Callable[..., Any]:
    """`tiny_tokenizer(chat=False)`: a byte-level tokenizer with eos and padding tokens."""
    return build_tokenizer


@pytest.fixture
def saved_tiny_lm(tmp_path: Path) -> Callable[..., Path]:
    """`saved_tiny_lm(family="llama", chat=False, **config)`: folder that the Auto classes load."""

    def save(family: str = "llama", *, chat: bool = False, **overrides: Any) -> Path:
        folder = Path(tempfile.mkdtemp(prefix=f"{family}-", dir=tmp_path))
        build_lm(family, **overrides).save_pretrained(folder)
        build_tokenizer(chat=chat).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(autouse=True)
def _same_seed_for_every_test() -> Iterator[None]:
    """A test that draws from the global generator draws the same numbers alone and in the suite."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
