"""The Triton attention kernels compile, for GPUs that this machine needn't have, and fit their shared memory.

The interpreter forgives what the compiler doesn't. This file is also the program that compiles, in a process of its
own: whether kernels are interpreted is settled when their module is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import minisgl

pytest.importorskip("triton")

SHARED_BYTES = {80: 166_912, 89: 101_376, 90: 232_448}  # a program at most, by compute capability
BUILDS = [  # kernel, capability, dtype (fp8: of the cache, under bf16), head_dim
    *(("prefill", 90, "bf16", dim) for dim in (64, 128, 256)),
    ("short prefill", 90, "bf16", 128),
    *(("prefill", 89, "bf16", dim) for dim in (80, 256)),
    ("prefill", 80, "fp32", 128),
    ("decode", 90, "bf16", 128),
    ("decode", 89, "fp16", 256),
    ("decode", 80, "fp32", 96),
    ("decode", 90, "fp8", 128),
    ("prefill", 90, "fp8", 64),
]


def test_triton_kernels_compile_and_fit(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    env["PYTHONPATH"] = str(Path(minisgl.__file__).parent.parent)
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    built = json.loads(done.stdout)
    assert len(built) == len(BUILDS)
    for (kernel, capability, dtype, dim), shared in zip(BUILDS, built, strict=True):
        assert 0 < shared <= SHARED_BYTES[capability], (kernel, capability, dtype, dim)


def build(kernel: str, capability: int, dtype: str, dim: int) -> int:
    """Compiles one kernel as the backend would have it; returns the bytes of shared memory."""
    import torch
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from minisgl.attention import triton_decode, triton_prefill
    from minisgl.attention.triton_tiles import decode_tile, prefill_tile

    fp8 = "i16" if kernel == "decode" else "fp8e4nv"  # decode reads words of two
    cache = fp8 if dtype == "fp8" else dtype
    dtype = "bf16" if dtype == "fp8" else dtype
    dim_pad = triton.next_power_of_2(dim)
    element = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    stored = element if cache == dtype else torch.float8_e4m3fn
    constants: dict[str, Any] = {"KV_HEADS": 8, "GROUP": 2, "DIM": dim, "DIM_PAD": dim_pad, "PAGE": 16}
    if kernel == "decode":
        function, tile = triton_decode._decode, decode_tile(dim_pad, element, stored, split=True)
        constants |= {"ROWS": 16, "SPLIT": True, "PDL": capability >= 90}
        constants["PACK"] = 1 if cache == dtype else 2
        constants["OPERAND"] = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}[
            dtype if cache == dtype else "fp16"
        ]
        if dtype == "fp16":
            constants["order"] = None  # of small batches
    else:
        shared, short = SHARED_BYTES[capability], kernel == "short prefill"
        function, tile = triton_prefill._prefill, prefill_tile(dim_pad, element, shared, short)
        constants |= {"ROWS": tile.rows, "QUERIES": tile.rows // 2, "WIDE": False}
    constants["TOKENS"] = tile.tokens
    if cache == dtype:
        constants |= {"k_scale": None, "v_scale": None}
    tensors = dict.fromkeys(("q", "out"), f"*{dtype}") | dict.fromkeys(("keys", "values"), f"*{cache}")
    tensors |= dict.fromkeys(("table", "table_rows", "order", "lens", "starts"), "*i32") | dict.fromkeys(
        ("part_out", "part_lse", "k_scale", "v_scale"), "*fp32"
    )
    names = function.arg_names
    tensors = {name: type for name, type in tensors.items() if name not in constants}
    types = tensors | {"scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    aligned = [name for name in ("q", "q_stride", "keys", "values", "out") if name in names]
    source = ASTSource(
        fn=function,
        signature={name: types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return int(compiled.metadata.shared)


if __name__ == "__main__":
    print(json.dumps([build(*args) for args in BUILDS]))
