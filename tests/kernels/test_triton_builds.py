"""The engine's Triton kernels compile, for GPUs that this machine needn't have: the interpreter forgives too much.

This file is also the program that compiles, in a process of its own: whether kernels are interpreted is settled when
their module is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import minisgl

pytest.importorskip("triton")


def test_step_kernels_compile(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    env["PYTHONPATH"] = str(Path(minisgl.__file__).parent.parent)
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def build(function: Any, capability: int, pointers: dict[str, str], constants: dict[str, Any], warps: int = 4) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    types = {name: f"*{kind}" for name, kind in pointers.items()} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=function,
        signature={name: types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    assert compiled.asm["cubin"]


def main() -> None:
    from minisgl.distributed import triton_one_shot as one_shot
    from minisgl.kernels.prepare import triton_v1 as prepare
    from minisgl.kernels.sample import triton_filter
    from minisgl.kernels.sample import triton_v1 as sample

    words = ("words", "table", "lengths", "last_token", "row_params", "ids", "positions", "lens")
    words += ("out_params", "output_index")
    step = dict.fromkeys(words, "i32") | {"slots": "i64"}
    floats = {"temperature": "fp32", "top_p": "fp32", "min_p": "fp32", "top_k": "i32"}
    for capability in (80, 90):
        build(prepare._prepare, capability, step, {"PAGE": 16, "BLOCK": prepare.BLOCK})
        for kind, low in (("bf16", 16), ("fp32", 0), ("fp16", 12)):
            constants = {"LOW": low, "BLOCK": triton_filter.BLOCK}
            build(triton_filter._filter, capability, {"logits": kind} | floats, constants, triton_filter.WARPS)
            pointers = {"logits": kind, "temperature": "fp32", "seeds": "i64", "index": "i32", "best": "fp32"}
            build(sample._sample_blocks, capability, pointers | {"place": "i32"}, {"BLOCK": sample.BLOCK})
        for size, bf16 in ((1, True), (2, False), (8, True)):
            constants = {"ROOM": one_shot.MOST_ONE_SHOT // 4, "SIZE": size, "BLOCK": one_shot.BLOCK, "BF16": bf16}
            pointers = {"x": "i32", "slots": "i64", "calls": "i32", "stop": "i32"}
            build(one_shot._one_shot, capability, pointers, constants)
        pointers = {"best": "fp32", "place": "i32", "out": "i64", "rows": "i32", "last": "i32"}
        build(sample._best_block, capability, pointers, {"chosen_by": None, "BLOCKS": 64})


if __name__ == "__main__":
    main()
