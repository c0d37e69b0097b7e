"""Whether models and data sets can be had: a folder here, the hub's cache, or, online, the hub."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

from l2d_framework.errors import DataError

Kind = Literal["model", "dataset"]


def is_reachable(name: str, kind: Kind) -> bool:
    """Look for a folder, a file or a hub id without downloading it."""
    return Path(name).expanduser().exists() or _is_on_hub(name, kind)


@cache
def _is_on_hub(name: str, kind: Kind) -> bool:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    if (Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}").is_dir():
        return True
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        HfApi().auth_check(name, repo_type=kind)
    except RepositoryNotFoundError:  # or one whose files this user may not have
        return False
    except Exception as error:  # of an HTTP library that releases of the hub's client exchange
        raise DataError(
            f"The hub cannot be asked for the {kind} {name!r} ({type(error).__name__}: {error}). Try again, or set "
            "HF_HUB_OFFLINE=1 to do with what is here."
        ) from error
    return True
