"""The fused write of an FP8 cache against the one in torch: its source on the host, and (marked cuda) on a GPU.

This file is also the program that runs the source on the host, in a process of its own: it replaces what launches.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from test_ladder_host import COMPILER, on_host

import minisgl
from minisgl.cache.pool import FP8, KVPool
from minisgl.kernels.qkv_post.op import qkv_post
from minisgl.types import KernelError


def compare(dtype: torch.dtype, device: str) -> None:
    """They are the same but for elements between two FP8 numbers, where a rounding more or less decides."""
    tokens, heads, kv_heads, dim = 37, 6, 3, 64
    rng = torch.Generator().manual_seed(0)
    pools = [KVPool(2, kv_heads, dim, 16, 8, FP8, device) for _ in range(2)]
    scale = torch.tensor([[1, 1, 1], [0.125, 2, 1]], device=device)
    for pool in pools:
        pool.set_scales(scale, scale.flip(1))
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=rng).mul_(20).to(device, dtype)
    angles = torch.randn(50, dim, generator=rng).cos().to(device)
    positions = torch.arange(tokens, dtype=torch.int32, device=device)
    slots = torch.randperm(128, generator=rng)[:tokens].to(device)
    slots[3] = -1
    exact = [torch.zeros(pools[0].slots(1)[0].shape, device=device) for _ in range(2)]
    fused, kept = qkv.clone(), qkv.float()
    qkv_post(kept, None, None, 0.0, angles, positions, *exact, slots)
    keys, values = pools[0].slots(1)
    qkv_post(fused, None, None, 0.0, angles, positions, keys, values, slots, None, *pools[0].scales(1))
    pools[1].store(1, exact[0], exact[1], torch.arange(exact[0].shape[0], device=device))
    for got, want in ((pools[0].k, pools[1].k), (pools[0].v, pools[1].v)):
        got, want = got.float(), want.float()
        assert (got != want).float().mean() < 1e-3
        torch.testing.assert_close(got, want, rtol=0.15, atol=2**-9)
    assert pools[0].k.float().abs().max() == 448, "the case has something to clamp"
    assert not pools[0].k[0].float().any()
    torch.testing.assert_close(fused[:, : heads * dim].float(), kept[:, : heads * dim], rtol=1e-2, atol=1e-2)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_qkv_post_writes_what_the_pool_s_store_writes(dtype: torch.dtype) -> None:
    compare(dtype, "cuda")


@pytest.mark.skipif(COMPILER is None, reason="there is no g++")
def test_qkv_post_source_writes_what_the_pool_s_store_writes() -> None:
    env = os.environ | {"PYTHONPATH": str(Path(minisgl.__file__).parent.parent)}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_qkv_post_wants_both_scales() -> None:
    cache = torch.zeros(9, 2, 16, dtype=FP8)
    angles, ids = torch.zeros(9, 16), torch.zeros(3, dtype=torch.int32)
    qkv, scale = torch.zeros(3, 96), torch.ones(2)
    with pytest.raises(KernelError, match="k_scale and v_scale"):
        qkv_post(qkv, None, None, 1e-6, angles, ids, cache, cache, ids, None, scale)
    with pytest.raises(KernelError, match="k_cache is torch.float8"):
        qkv_post(qkv, None, None, 1e-6, angles, ids, cache, cache, ids)
    with pytest.raises(KernelError, match="v_scale has shape"):
        qkv_post(qkv, None, None, 1e-6, angles, ids, cache, cache, ids, None, scale, torch.ones(3))


def main() -> None:
    from minisgl.kernels import check, spec
    from minisgl.kernels.qkv_post import op
    from minisgl.kernels.tuning import Config

    check.cuda = lambda **_: 0  # type: ignore[assignment]
    spec.capability = lambda _: (9, 0)  # type: ignore[assignment]
    spec.choose = lambda *_: Config(64, 2)
    with tempfile.TemporaryDirectory() as folder:
        op.prepare = on_host(Path(folder))
        compare(torch.bfloat16, "cpu")


if __name__ == "__main__":
    main()
