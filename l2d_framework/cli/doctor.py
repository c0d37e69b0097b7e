"""`l2d doctor`: what this machine and this installation can do, and what keeps them from doing more."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from l2d_framework.errors import install

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "l2d-framework"
PATIENCE = 8.0
"""Seconds that the hub may take to answer."""
LITTLE_ROOM = 10 * 2**30
"""Bytes of disk below which a checkpoint of a small model may not fit."""

EXTRAS = {
    "solvers-rk": "torchdiffeq's Runge-Kutta methods as solvers",
    "eval": "`l2d eval`, `l2d tune-search` and `lm_eval --model l2d`",
    "text-metrics": "MAUVE in `l2d eval-text`; GPLv3",
    "reward": "`l2d train-reward`",
    "plots": "pictures of `l2d plot`, `l2d demo`, `l2d diagnose` and `l2d eval-text`",
    "tensorboard": "`report_to: [tensorboard]` in run files",
    "zstd": "training texts in .zst files",
    "gguf": "`model.gguf_file` in run files",
    "kernels": "the loss of training in one kernel, on NVIDIA GPUs",
    "bench": "`l2d bench` and the papers' tasks",
    "torchao": "bases whose weights it quantized",
}
"""What each extra adds."""


@dataclass(frozen=True)
class Finding:
    """One fact, whether it is well, and what to do if not: a note costs something, a problem breaks something."""

    area: str
    name: str
    status: Literal["ok", "note", "problem"]
    value: str
    advice: str = ""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON, for programs.")] = False,
) -> None:
    """Examine versions, devices, compilers, room, sandbox, hub, plugins and extras; exit code 1 for a problem."""
    found = list(findings())
    is_well = all(finding.status != "problem" for finding in found)
    if as_json:
        typer.echo(json.dumps({"ok": is_well, "findings": [asdict(finding) for finding in found]}, indent=2))
    else:
        _show(found)
    raise typer.Exit(0 if is_well else 1)


def findings() -> Iterator[Finding]:
    """Everything that is examined, one area after the other; one that cannot be examined is a problem itself."""
    for area, examine in _AREAS.items():
        try:
            yield from examine(area)
        # What is broken here may break in any way, and the rest is still worth knowing.
        except Exception as error:
            yield Finding(area, area, "problem", f"{type(error).__name__}: {error}", "Install l2d-framework anew.")


def _versions(area: str) -> Iterator[Finding]:
    from packaging.requirements import Requirement

    yield Finding(area, "system", "ok", platform.platform())
    needed = metadata.metadata(DISTRIBUTION)["Requires-Python"]
    yield _version(area, Requirement(f"python{needed}"), platform.python_version(), "")
    yield Finding(area, DISTRIBUTION, "ok", metadata.version(DISTRIBUTION))
    for requirement in _requirements(""):
        yield _version(area, requirement, _installed(requirement.name), f"pip install '{requirement}'")


def _version(area: str, requirement: Requirement, version: str | None, advice: str) -> Finding:
    wanted = str(requirement.specifier)
    if version is None:
        return Finding(area, requirement.name, "problem", f"missing, needs {wanted}", f"Run: {advice}")
    if not requirement.specifier.contains(version, prereleases=True):
        advice = f"Run: {advice}" if advice else "Make an environment with a newer Python."
        return Finding(area, requirement.name, "problem", f"{version}, tested with {wanted}", advice)
    return Finding(area, requirement.name, "ok", f"{version} ({wanted})")


def _requirements(extra: str) -> list[Requirement]:
    """What the package needs in any case, or what an extra adds to that."""
    from packaging.requirements import Requirement

    found = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or []]
    return [one for one in found if _holds(one, extra) and (not extra or not _holds(one, ""))]


def _holds(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices(area: str) -> Iterator[Finding]:
    import torch

    yield Finding(area, "cpu", "ok", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        kind = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
        name = torch.cuda.get_device_name(index)
        yield Finding(area, f"cuda:{index}", "ok", f"{name}, {_size(free)} of {_size(total)} free, {kind}")
    if torch.cuda.is_available():
        return
    if torch.backends.mps.is_available():
        yield Finding(area, "mps", "ok", "Apple GPU")
    elif shutil.which("nvidia-smi"):
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        advice = "Install a torch that fits the driver: https://pytorch.org/get-started/locally/"
        yield Finding(area, "gpu", "problem", f"there is a driver, but torch, {built}, finds no device", advice)
    else:
        yield Finding(area, "gpu", "note", "none", "Small models train on a CPU; larger ones take days.")


def _compile(area: str) -> Iterator[Finding]:
    import torch

    # Of what torch.compile makes, kernels are C++ on a CPU and Triton's on a GPU, which builds C around each.
    has_gpu = torch.cuda.is_available()
    own = os.environ.get("CC" if has_gpu else "CXX")
    usual = ["gcc", "clang"] if has_gpu else [{"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")]
    names = [own] if own else usual
    found = next(filter(shutil.which, names), None)
    lacking = ["Triton"] if has_gpu and find_spec("triton") is None else []
    if found is None:
        lacking.append(f"C{'' if has_gpu else '++'} compiler ({' or '.join(names)})")
    if sys.platform == "linux" and not Path(sysconfig.get_path("include"), "Python.h").is_file():
        lacking.append("header files of Python")
    if lacking:
        advice = "Install it (on Debian g++ and python3-dev), or leave `compile` out: layers then run as they are."
        yield Finding(area, "compile", "note", f"cannot be used: no {', no '.join(lacking)}", advice)
    else:
        yield Finding(area, "compile", "ok", f"can be used, with {'Triton and ' if has_gpu else ''}{found}")


def _room(area: str) -> Iterator[Finding]:
    import psutil
    from huggingface_hub import constants

    memory = psutil.virtual_memory()
    yield Finding(area, "memory", "ok", f"{_size(memory.available)} of {_size(memory.total)} free")
    places = {
        "working folder": Path.cwd(),
        "hub's cache": Path(constants.HF_HOME),
        "temporary": Path(tempfile.gettempdir()),
    }
    for name, folder in places.items():
        here = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(here).free
        if not os.access(here, os.W_OK):
            yield Finding(area, name, "problem", f"{here} cannot be written", "Change its rights, or use another.")
        elif free < LITTLE_ROOM:
            yield Finding(area, name, "note", f"{_size(free)} free in {here}", "Models of many sizes will not fit.")
        else:
            yield Finding(area, name, "ok", f"{_size(free)} free in {here}")


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def _sandbox(area: str) -> Iterator[Finding]:
    from l2d_framework.evaluation.code.sandbox import ALLOW_NETWORK, Sandbox

    obstacle = Sandbox().obstacle()
    if obstacle is None:
        yield Finding(area, "isolation", "ok", "programs that models write run without network")
    elif os.environ.get(ALLOW_NETWORK) == "1":
        advice = f"{ALLOW_NETWORK}=1 gives programs your network and files all the same; unset it to refuse them."
        yield Finding(area, "isolation", "note", f"none ({obstacle})", advice)
    else:
        advice = "Only code tasks need it: Linux 5.12 or newer with user namespaces, which containers often forbid."
        yield Finding(area, "isolation", "note", f"none ({obstacle})", advice)


def _hub(area: str) -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield Finding(area, "access", "ok", "not asked: HF_HUB_OFFLINE is set, so only its cache and folders are used")
        return
    start = time.perf_counter()
    outcome = _asked()
    if outcome is None:
        yield Finding(area, "access", "ok", f"{constants.ENDPOINT} answered in {time.perf_counter() - start:.1f} s")
        signed = "signed in" if get_token() else "not signed in"
        yield Finding(area, "account", "ok", f"{signed}; gated models ask for `hf auth login`")
    else:
        advice = "Without a network set HF_HUB_OFFLINE=1: what is here is then found without waiting."
        yield Finding(area, "access", "note", f"{constants.ENDPOINT}: {outcome}", advice)


def _asked() -> str | None:
    """What went wrong when the hub was asked for a model that everybody may see; None if it answered."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    outcome: list[str | None] = []

    def ask() -> None:
        try:
            HfApi().model_info("openai-community/gpt2", timeout=PATIENCE)
            outcome.append(None)
        except HfHubHTTPError as error:  # a mirror may lack the model, and has answered
            code = getattr(error.response, "status_code", 500)
            outcome.append(None if code in (401, 403, 404) else str(error).splitlines()[0])
        except Exception as error:  # of an HTTP library that releases of the hub's client exchange
            outcome.append(f"{type(error).__name__}: {error}".splitlines()[0])

    # Looking a name up knows no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return outcome[0] if outcome else f"no answer in {PATIENCE:g} s"


def _plugins(area: str) -> Iterator[Finding]:
    from l2d_framework.registry import extensions, registry

    rows = [row for part in (registry(), extensions()) for row in part.table()]
    for row in rows:
        if row.status in ("broken", "clash"):
            name = f"{row.kind} {row.name} of {row.distribution} {row.version}".strip()
            yield Finding(area, name, "problem", row.error, "Repair or uninstall it; nothing else is hurt.")
        elif row.status == "missing extra" and row.distribution != DISTRIBUTION:
            yield Finding(area, f"{row.kind} {row.name}", "note", row.error)
    for shipper, count in Counter(f"{row.distribution} {row.version}" for row in rows if row.status == "ok").items():
        yield Finding(area, shipper, "ok", f"{count} components, presets and commands")


def _extras(area: str) -> Iterator[Finding]:
    for extra, adds in EXTRAS.items():
        requirements, advice = _requirements(extra), install(f"{DISTRIBUTION}[{extra}]")
        versions = [_installed(requirement.name) for requirement in requirements]
        if not all(versions):
            yield Finding(area, extra, "note", f"missing: {adds}", f"Run: {advice}")
            continue
        for requirement, version in zip(requirements, versions, strict=True):
            found = _version(area, requirement, version, advice)
            yield Finding(area, extra, found.status, f"{requirement.name} {found.value}", found.advice)


_AREAS: dict[str, Callable[[str], Iterator[Finding]]] = {
    "versions": _versions,
    "devices": _devices,
    "compilers": _compile,
    "memory and disk": _room,
    "sandbox": _sandbox,
    "hub": _hub,
    "plugins": _plugins,
    "extras": _extras,
}


def _show(found: list[Finding]) -> None:
    from rich.console import Console

    from l2d_framework.evaluation.tables import terminal

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a file or pipe has no edge to wrap at
    rows = [(one.area, one.name, "" if one.status == "ok" else one.status, one.value) for one in found]
    console.print(terminal([("area", "name", "", "found"), *rows]))
    for one in found:
        if one.advice:
            text = f"{one.status}: {one.name}: {one.advice}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
    problems = sum(one.status == "problem" for one in found)
    console.print(f"{problems or 'No'} problem{'' if problems == 1 else 's'}.")
