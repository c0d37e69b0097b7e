"""The reproducibility card: what a run was made of, what it ran on, and what came out."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from l2d_framework.hooks import GROUP
from l2d_framework.training.metrics import BINS
from l2d_framework.writing import speed

_DISTRIBUTION = "l2d-framework"
_MARKS = ("sha256", "sha256_of_first_rows", "sha256_of_ends", "rows")
"""What tells the data of a source from others, where a card has it."""


def now() -> str:
    """This moment, in universal time."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment(processes: int) -> dict[str, Any]:
    """Sections `hardware` and `versions`, and `commit`, which is None outside a git repository."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    hardware = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory": memory,
        "gpus": [{"name": gpu.name, "memory": gpu.total_memory} for gpu in gpus],
        "processes": processes,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }
    return {"hardware": hardware, "versions": _versions(), "commit": _commit()}


def changed_data(before: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    """In which sources the data of a card differ from those of an earlier card of the same run, and how."""
    found = []
    for which, sources in data["sources"].items():
        for number, (old, new) in enumerate(zip(before["sources"][which], sources, strict=True)):
            pairs = {mark: (old.get(mark), new.get(mark)) for mark in _MARKS}
            differing = [mark for mark, pair in pairs.items() if None not in pair and pair[0] != pair[1]]
            if differing:
                mark = differing[0]
                there, here = (str(value)[:12] for value in pairs[mark])
                found.append(f"data.{which}.{number}, {new['path']!r}, has {mark} {there} there, {here} now")
    if not found and before["splits"] != data["splits"]:
        found.append(
            f"the same sources give {dict(before['splits'])} there, {dict(data['splits'])} now, so the tokenizer, a "
            "chat template or this package has changed"
        )
    return found


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    required = [re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in metadata.requires(_DISTRIBUTION) or []]
    plugins = [point.dist.name for point in metadata.entry_points(group=GROUP) if point.dist]
    versions = {"python": platform.python_version()}
    for name in dict.fromkeys([_DISTRIBUTION, *plugins, *required, "deepspeed"]):
        with suppress(metadata.PackageNotFoundError):  # an extra that is not installed
            versions[name] = _version(name)
    return versions


@cache
def _version(name: str) -> str:
    return metadata.version(name)


def _commit() -> str | None:
    git = partial(subprocess.check_output, text=True, stderr=subprocess.DEVNULL)
    try:
        sha = git(["git", "rev-parse", "HEAD"]).strip()
        changed = git(["git", "status", "--porcelain", "--untracked-files=no"]).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{sha} with local changes" if changed else sha


def model_card_table(card: Mapping[str, Any]) -> str:
    """Markdown table of a finished run, for a model card."""
    lines = [f"| {name} | {str(value).replace('|', '/')} |" for name, value in _rows(card)]
    return "\n".join(["## Training", "", "| | |", "|---|---|", *lines, ""])


def _rows(card: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    yield "configuration", f"`{card['config_hash']}`, complete in `run.json`"
    for which, sources in card["data"]["sources"].items():
        for source in sources:
            mark = source.get("sha256") or source.get("sha256_of_first_rows") or source.get("fingerprint")
            named = "/".join(str(source[key]) for key in ("path", "name") if source.get(key))
            yield f"{which} data", f"`{named}`, split `{source['split']}`, {source['rows']} rows, `{str(mark)[:16]}`"
    for which, sizes in card["data"]["splits"].items():
        counts = ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in sizes.items() if value is not None)
        yield f"{which} split", counts or "a stream"
    yield "seeds", ", ".join(f"{name} {value}" for name, value in card["seeds"].items())

    result = card["result"]
    yield "updates", f"{result['steps']:,}"
    yield "parameters", f"{card['parameters']['trainable']:,} trained of {card['parameters']['total']:,}"
    for name, prefix in (("last training loss", ""), ("held-out loss", "eval_")):
        losses = result["losses"]
        if f"{prefix}loss" in losses:
            yield name, f"{losses[f'{prefix}loss']:.4f} nats per token"
        bins = [losses.get(f"{prefix}loss_t{i:02d}") for i in range(BINS)]
        if any(bins):
            yield f"{name} from t = 0 to 1", ", ".join("none" if value is None else f"{value:.3f}" for value in bins)
    yield "duration", f"{card['seconds']:,.0f} s"
    yield "speed", speed(result["tokens_per_second"])
    yield "peak memory", _gigabytes(result["peak_memory"])

    hardware = card["hardware"]
    gpus = ", ".join(gpu["name"] for gpu in hardware["gpus"]) or "no GPU"
    memory = _gigabytes(hardware["memory"]) if hardware["memory"] else "unknown memory"
    yield "hardware", f"{hardware['cpu']}, {hardware['cores']} cores, {memory}; {gpus}"
    yield "processes and threads of each", f"{hardware['processes']} and {hardware['threads']}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    yield "commit", card["commit"] or "none"
    yield "started and ended", f"{card['started']}, {card['ended']}"


def _gigabytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
