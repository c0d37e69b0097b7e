"""Random numbers keyed by what they are for, so that no result depends on batch mates, order or number of processes.

Every token owns Philox streams whose 128-bit key is a hash of (seed, request, position, sample, purpose). A second copy
of a prompt in one call is a request of its own. The global generators of torch and numpy are never used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor
from typing_extensions import override

_BLOCK = 32


def stream_key(*parts: int | str) -> bytes:
    """Key of a random stream, 16 bytes, from whatever names it, such as seed, request, position and purpose."""
    return hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=16).digest()


def keyed_generator(*parts: int | str) -> np.random.Generator:
    """Philox generator at the start of the stream that `parts` name."""
    key: Any = _Key(stream_key(*parts))  # an interface that numpy takes and its annotations do not name
    return np.random.Generator(np.random.Philox(key))


class _Key(ISeedSequence):
    """Hands a key on as it is; beside an argument `key`, numpy would ask the system for entropy, which takes longer."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @override
    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> Any:
        return np.frombuffer(self._key, "<u8").astype(dtype)


def request_keys(prompts: Sequence[Sequence[int]]) -> list[str]:
    """Name of each request: hash of its prompt's tokens, without padding, and how often the same prompt came before."""
    seen: dict[str, int] = {}
    names = []
    for prompt in prompts:
        digest = hashlib.blake2b(np.asarray(prompt, dtype=np.int64).tobytes(), digest_size=16).hexdigest()
        occurrence = seen.get(digest, 0)
        seen[digest] = occurrence + 1
        names.append(f"{digest}.{occurrence}")
    return names


def categorical(probabilities: Tensor, u: Tensor) -> Tensor:
    """Tokens, (...), whose interval of the cumulative distribution contains `u`, (...) in [0, 1).

    `probabilities`, (..., V), are weights that need not sum to 1; a token of weight zero is never drawn. One number per
    draw, whatever the vocabulary, and the same number gives the same token on every device up to ties.
    """
    cumulative = probabilities.cumsum(-1)
    total = cumulative[..., -1:]
    # Below the total even where the product is rounded up to it, so that no token of weight zero at the end is found.
    below = torch.nextafter(total, torch.full_like(total, -torch.inf))
    index = torch.searchsorted(cumulative, torch.minimum((u[..., None] * total).to(total.dtype), below), right=True)
    return index.clamp_max(cumulative.shape[-1] - 1).squeeze(-1)


class TokenStreams:
    """One independent stream per token of a (B, L) block, each named by a tuple of key parts."""

    def __init__(self, keys: Sequence[Sequence[tuple[int | str, ...]]], device: torch.device) -> None:
        self._keys = keys
        self.device = device
        self._buffer = torch.empty(len(keys), len(keys[0]), 0)
        self._used = torch.zeros(self._buffer.shape[:2], dtype=torch.int64, device=device)
        self._calls = 0
        self._branches: dict[int, TokenStreams] = {0: self}

    @cached_property
    def _generators(self) -> list[list[np.random.Generator]]:
        return [[keyed_generator(*parts) for parts in row] for row in self._keys]

    def branch(self, number: int) -> TokenStreams:
        """Further independent streams of the same tokens, the same at every call; 0 is this object itself."""
        if number not in self._branches:
            keys = [[(*parts, number) for parts in row] for row in self._keys]
            self._branches[number] = TokenStreams(keys, self.device)
        return self._branches[number]

    def uniform(self, active: Tensor | None = None) -> Tensor:
        """Next number in [0, 1) of every stream that is `active`, (B, L), float32; of no meaning where not."""
        if self._calls >= self._buffer.shape[-1]:
            fresh = [[g.random(_BLOCK, dtype=np.float32) for g in row] for row in self._generators]
            block = torch.from_numpy(np.asarray(fresh)).to(self.device)
            self._buffer = torch.cat([self._buffer.to(self.device), block], -1)
        value = self._buffer.gather(-1, self._used[..., None]).squeeze(-1)
        self._used = self._used + (1 if active is None else active.long())
        self._calls += 1
        return value

    def rewind(self) -> None:
        """Start every stream of `uniform` over, those of branches too, so that the same numbers come again."""
        for branch in self._branches.values():
            branch._used = torch.zeros_like(branch._used)
            branch._calls = 0

    def normal(self, size: int) -> Tensor:
        """Next normal numbers of every stream, (B, L, size), float32; not to be mixed with `uniform` on one object."""
        draws = [[g.standard_normal(size, dtype=np.float32) for g in row] for row in self._generators]
        return torch.from_numpy(np.asarray(draws)).to(self.device)

    def seeds(self) -> Tensor:
        """Next seed of every stream, (B, L), int64, on the host; not to be mixed with `uniform` on one object."""
        draws = [[int(g.integers(2**63)) for g in row] for row in self._generators]
        return torch.tensor(draws)
