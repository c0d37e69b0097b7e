"""Expected embeddings without the simplex: a kernel that draws the noise itself gives what the plain way gives."""

import os
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from l2d_framework.diffusion.logits import dense
from l2d_framework.training.shapes import Shape
from l2d_plugins.parametrizations.simplex import fused, state
from l2d_plugins.parametrizations.simplex.fused import fused_embedding
from l2d_plugins.parametrizations.simplex.space import expected_embedding
from l2d_plugins.parametrizations.simplex.state import WideState

KERNEL = "l2d_plugins.parametrizations.simplex.kernel"
B, L, V, H = 2, 17, 70, 300
"""Positions, tokens and width end in the midst of a second or third block of the kernel."""


def philox(seed, places):
    """The first two words of Philox4x32-10 under a seed, one subsequence per place (Salmon et al. 2011)."""
    low, shift = np.uint64(2**32 - 1), np.uint64(32)
    a, b, c, d = (np.zeros_like(places), np.zeros_like(places), places, np.zeros_like(places))
    key = [seed % 2**32, seed >> 32]
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
        a, b, c, d = (
            second >> shift ^ b ^ np.uint64(key[0]),
            second & low,
            first >> shift ^ d ^ np.uint64(key[1]),
            first & low,
        )
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return a, b


def on_cuda(seed, size):
    """What `torch.randn(size, device="cuda")` gives after `torch.manual_seed(seed)`."""
    radius, angle = ((word + 0.5) / 2**32 for word in philox(seed, np.arange(size, dtype=np.uint64)))
    return torch.from_numpy(np.sqrt(-2 * np.log(radius)) * np.sin(2 * np.pi * angle)).float()


def filled(out, seeds, weights):
    for place, seed, weight in zip(out.flatten(0, 1), seeds.flatten().tolist(), weights.flatten(), strict=True):
        place.copy_(weight * on_cuda(seed, len(place)))
    return out


def expected(seeds, scales, ids, heights, table):
    """What the kernel is to do, number by number."""
    x = torch.stack([scale * on_cuda(seed, len(table)) for scale, seed in zip(scales, seeds.tolist(), strict=True)])
    return x.scatter_add(-1, ids[:, None], heights[:, None]).softmax(-1) @ table


@pytest.fixture(params=["stand-in", "triton"])
def device(request, monkeypatch):
    """Where there is a kernel, and noise is that of CUDA."""
    fused._is_right.cache_clear()
    if request.param == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            return torch.device("cuda")
    else:
        stand_in(monkeypatch, expected)
    monkeypatch.setattr(fused, "_has_kernel", lambda table: True)
    monkeypatch.setattr(state, "_fill", filled)
    return torch.device("cpu")


def stand_in(monkeypatch, function):
    module = ModuleType(KERNEL)
    module.expected = function
    monkeypatch.setitem(sys.modules, KERNEL, module)
    fused._is_right.cache_clear()


def states(device):
    generator = torch.Generator().manual_seed(2)
    noise = WideState.normal(torch.randint(2**62, (B, L), generator=generator), V, device)
    tokens = WideState.simplex(torch.randint(V, (B, L), generator=generator).to(device), 5.0, V)
    share = torch.rand(B, L, 1, generator=generator).to(device)
    return {"noise": 5 * noise, "tokens": tokens, "both": share * tokens - 3 * (1 - share) * noise}


def table(device):
    return torch.randn(V, H, generator=torch.Generator().manual_seed(1)).to(device)


# Printed by many who ran `torch.manual_seed(SEED)` and `torch.randn(..., device="cuda")`.
PRINTED = {
    0: [-0.9247, -0.4253, -2.6438, 0.1452, -0.1209, -0.5797],
    42: [0.1940, 2.1614, -0.1721, 0.8491, -1.9244, 0.6530],
}


@pytest.mark.parametrize("seed", PRINTED)
def test_noise_is_that_of_torch_on_cuda(seed, device):
    x = WideState.normal(torch.tensor([[seed]]), 6, device)
    found = fused_embedding(x, torch.eye(6, device=device)).log()[0, 0].cpu()
    wanted = torch.tensor(PRINTED[seed])
    torch.testing.assert_close(found - found[0], wanted - wanted[0], rtol=0, atol=2e-4)


@pytest.mark.parametrize("mix", ["mean", "sum", "none"])
def test_the_kernel_gives_what_the_plain_way_gives(mix, device, monkeypatch):
    weights, generator = table(device), torch.Generator().manual_seed(3)
    before = [None]
    if mix != "none":
        before += [torch.randn(B, L, size, generator=generator).to(device) for size in (V, H)]
    asked = [(x, previous) for x in states(device).values() for previous in before]
    found = [expected_embedding(x, weights, previous, mix) for x, previous in asked]
    assert fused_embedding(asked[0][0], weights) is not None
    monkeypatch.setattr(fused, "_has_kernel", lambda table: False)
    for one, (x, previous) in zip(found, asked, strict=True):
        torch.testing.assert_close(one, expected_embedding(x, weights, previous, mix), rtol=1e-4, atol=1e-5)


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from l2d_plugins.parametrizations.simplex import kernel

for dtype, precision, capability in (("fp32", "ieee", 80), ("bf16", "tf32", 90)):
    given = {name: "*i64" for name in ("seeds", "ids")} | {name: "*fp32" for name in ("scales", "heights")}
    given |= {name: "*" + dtype for name in ("table", "out")}
    given |= {name: "i32" for name in ("count", "size", "width", "stride")}
    fixed = {"PRECISION": precision, "ROWS": kernel._ROWS, "PLACES": kernel._PLACES, "COLUMNS": kernel._COLUMNS}
    source = triton.compiler.ASTSource(kernel._expected, given | dict.fromkeys(fixed, "constexpr"), fixed)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    assert made.asm["cubin"]
"""


def test_the_kernel_compiles_for_gpus_that_need_not_be_here(tmp_path):
    # The interpreter forgives what a compiler does not, such as a name that only the body of a loop knows.
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", COMPILED], env={**environment, "TRITON_CACHE_DIR": str(tmp_path)}, check=True)


@pytest.mark.parametrize("device", ["stand-in"], indirect=True)
def test_the_kernel_works_in_the_type_of_autocast(device, monkeypatch):
    x, weights = states(device)["both"], table(device)
    with torch.autocast(device.type, torch.bfloat16):
        found = expected_embedding(x, weights)
        monkeypatch.setattr(fused, "_has_kernel", lambda table: False)
        wanted = expected_embedding(x, weights)
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


def test_other_states_and_a_gradient_of_the_table_take_the_plain_way(monkeypatch):
    stand_in(monkeypatch, lambda *_: pytest.fail("asked"))
    monkeypatch.setattr(fused, "_is_right", lambda *_: True)
    cpu = torch.device("cpu")
    both, weights = states(cpu)["both"], table(cpu)
    assert fused_embedding(both, weights) is None  # on a CPU
    monkeypatch.setattr(fused, "find_spec", lambda name: "installed")
    shape = Shape(torch.empty(V, H, device="meta"), torch.device("cuda"))
    assert shape.is_cuda and fused_embedding(both, shape) is None  # in a dry run
    monkeypatch.setattr(fused, "_has_kernel", lambda table: True)
    assert fused_embedding(dense(both), weights) is None
    assert fused_embedding(both + WideState.normal(torch.ones(B, L, dtype=torch.int64), V, cpu), weights) is None
    assert fused_embedding(both, weights.requires_grad_()) is None


def other_noise(seeds, *rest):
    return expected(seeds + 1, *rest)


def no_device(*_):
    raise RuntimeError("no such device")


@pytest.mark.parametrize("device", ["stand-in"], indirect=True)
@pytest.mark.parametrize(
    ("broken", "reason"),
    [(other_noise, "it differs from what torch computes"), (no_device, "RuntimeError: no such device")],
)
def test_a_kernel_that_draws_other_noise_or_fails_is_left_alone_and_that_is_said_once(
    broken, reason, device, monkeypatch
):
    stand_in(monkeypatch, broken)
    x, weights = states(device)["both"], table(device)
    with pytest.warns(UserWarning, match=f"states of 70 tokens and torch.float32 is not used on {device}: {reason}"):
        found = expected_embedding(x, weights)
    torch.testing.assert_close(found, dense(x).softmax(-1) @ weights)
    expected_embedding(x, weights)
