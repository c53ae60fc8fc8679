"""prepare in the laboratory: its reference, and what it is tested and measured with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minisgl.kernels.prepare.op import NEVER, DecodeInputs, RowTables, prepare, reference
from minisgl.kernels.rmsnorm.ladder import triton_fits
from minisgl.kernels.spec import KernelSpec, Run, Shape, Version, register
from minisgl.kernels.tuning import Config

PAGE = 16


def _run(*args: Tensor, version: str | None = None, config: Config | None = None) -> None:
    """As `prepare`, with the tensors of its tuples one by one."""
    if version is not None:
        SPEC.version(version)
    prepare(*_tuples(args))


def _tuples(args: tuple[Tensor, ...]) -> tuple[Tensor, RowTables, int, DecodeInputs]:
    return args[0], RowTables(*args[1:5]), PAGE, DecodeInputs(*args[5:])


def _v1(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    from minisgl.kernels.prepare import triton_v1

    return lambda *args: triton_v1.run(*_tuples(args))


def _reference(*args: Tensor) -> None:
    reference(*_tuples(args))


def _inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator, copies: int
) -> list[tuple[Any, ...]]:
    """Rows in random order; every third has gained the page that its next token needs."""
    count, rows, pages = shape["tokens"], shape["rows_of_state"], shape["pages"]

    def numbers(limit: int, *size: int) -> Tensor:
        return torch.randint(0, limit, size, dtype=torch.int32, device=device, generator=generator)

    found = []
    for _ in range(copies):
        tables = numbers(1000, rows + 1, pages), numbers(pages * PAGE - 1, rows + 1), numbers(50_000, rows + 1)
        words = torch.stack((torch.randperm(rows, device=device, generator=generator)[:count].int(),) * 3)
        gained = torch.arange(count, device=device) % 3 == 0
        words[1] = torch.where(gained, tables[1][words[0].long()] // PAGE, NEVER)
        words[2] = numbers(1000, count)
        tables[1][rows] = 0
        found.append((words, *tables, numbers(100, rows + 1, 8), *DecodeInputs.empty(count, device)))
    return found


def _cost(shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    return shape["tokens"] * (12 + 4 + 4 + 8 + 32 + 20 + 8 + 32), 0


_CASES = ((1, 4, 3), (9, 9, 40), (200, 300, 7))
SPEC = register(
    KernelSpec(
        name="prepare",
        run=_run,
        reference=_reference,
        library=_reference,
        versions=(Version("v1", "triton", triton_fits, _v1),),
        sizes=("tokens", "rows_of_state", "pages"),
        cost=_cost,
        inputs=_inputs,
        outputs=(),
        updated=(1, 2, 5, 6, 7, 8, 9, 10),
        tolerance=dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), 0.0),  # of the model; no number has it
        cases=tuple(
            {"tokens": n, "rows_of_state": r, "pages": p} for n, r, p in ((1, 4, 3), (9, 9, 40), (200, 300, 7))
        ),
        bench=(),  # a call counts lengths up: replayed a thousand times, it would leave its tables
    )
)
