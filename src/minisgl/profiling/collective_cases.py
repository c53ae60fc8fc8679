"""The all-reduce as a kernel of the registry: NCCL's paths on a GPU, gloo between two ranks on a CPU.

It lies here, not in `kernels/`, since collectives belong to `distributed/`, which kernels know nothing of. One process
checks what one process can: on a GPU a group of one goes the whole way through buffers, windows and kernels. Groups of
several GPUs are tested by `tests/distributed/` and timed by `minisgl profile comm`.
"""

from __future__ import annotations

import atexit
import importlib.util
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisgl.distributed import TPGroup
from minisgl.distributed.allreduce import view_of
from minisgl.distributed.group import communicator
from minisgl.distributed.paths import ANYWHERE
from minisgl.kernels.nvrtc import Capability
from minisgl.kernels.spec import KernelSpec, Run, Shape, Version, register
from minisgl.kernels.tuning import Config

CPU_RANKS = 2
ON_GPU = (*ANYWHERE, "registered", "two_shot")
LIMIT_S = 120.0


def all_reduce(inputs: Tensor, out: Tensor, *, version: str | None = None, config: Config | None = None) -> None:
    """`inputs` [ranks, n], a row for each rank; every row of `out` becomes their sum."""
    if inputs.is_cuda:
        reduce = _alone(inputs.get_device()).reduce
        path = version or reduce.path_of(out[0])
        x = view_of(reduce.places[path], (inputs.shape[1],), inputs.dtype) if path in reduce.places else out[0]
        x.copy_(inputs[0])
        reduce.paths[path](x)
        out[0].copy_(x)
        return
    with tempfile.TemporaryDirectory(prefix="minisgl-") as folder, ThreadPoolExecutor(len(inputs)) as threads:
        list(threads.map(partial(_rank, inputs, out, Path(folder)), range(len(inputs))))


def _rank(inputs: Tensor, out: Tensor, folder: Path, rank: int) -> None:
    group = TPGroup.connect(rank, len(inputs), torch.device("cpu"), folder, LIMIT_S)
    out[rank].copy_(inputs[rank])
    group.all_reduce(out[rank])
    group.close()


@cache
def _alone(device: int) -> Any:
    """The communicator (`NcclCommunicator`) of a group of one GPU, which is kept: starting it takes half a second."""
    with tempfile.TemporaryDirectory(prefix="minisgl-") as folder:
        comm = communicator(0, 1, torch.device("cuda", device), Path(folder), LIMIT_S)
    atexit.register(comm.close)
    return comm


def _reference(inputs: Tensor, out: Tensor) -> None:
    out.copy_(inputs.sum(0).expand_as(out))


def _inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator, copies: int
) -> list[tuple[Any, ...]]:
    size = (1 if device.type == "cuda" else CPU_RANKS, shape["elements"])
    drawn = (torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(copies))
    return [(x, torch.empty_like(x)) for x in drawn]


def _cost(shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    """Of one rank: its tensor read and written. What crosses links isn't memory's to carry."""
    return 2 * shape["elements"] * dtype.itemsize, shape["elements"]


def _supports(path: str, where: Capability, dtype: torch.dtype, shape: Shape) -> str | None:
    on_gpu = where != (0, 0)
    if path == "gloo":
        return "serves ranks on CPUs; between GPUs NCCL does" if on_gpu else None
    if not on_gpu:
        return "needs an NVIDIA GPU"
    if importlib.util.find_spec("nccl") is None:
        return "nccl4py isn't installed; it comes with the extra 'cuda'"
    reduce = _alone(torch.cuda.current_device()).reduce
    if path not in reduce.paths:
        return "this machine's NCCL, torch or links don't offer it"
    copy = f"{path}_copy" if path in reduce.places else path  # the same limits
    usable = reduce.usable(shape["elements"] * dtype.itemsize, dtype)
    return None if copy in usable else f"can't take {shape['elements']} elements of {dtype}"


def _prepare(path: str, device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    return partial(all_reduce, version=path)


SPEC = register(
    KernelSpec(
        name="nccl",
        run=all_reduce,
        reference=_reference,
        library=_reference,
        versions=tuple(
            Version(path, "collective", partial(_supports, path), partial(_prepare, path)) for path in (*ON_GPU, "gloo")
        ),
        sizes=("elements",),
        inputs=_inputs,
        outputs=(1,),
        updated=(),
        cost=_cost,
        tolerance={torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4},
        cases=({"elements": 8}, {"elements": 4099}, {"elements": 1 << 20}),
        bench=({"elements": 1 << 12}, {"elements": 1 << 20}),
    )
)
