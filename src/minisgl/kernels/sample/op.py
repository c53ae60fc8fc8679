"""sample: a token a row, by argmax or by Gumbel-max: argmax(logits / t + noise) is drawn from softmax(logits / t)."""

from __future__ import annotations

import torch
from torch import Tensor

from minisgl.kernels import check
from minisgl.types import KernelError


def sample_tokens(
    logits: Tensor, temperature: Tensor, seeds: Tensor, index: Tensor, out: Tensor, first: int = 0,
    best: Tensor | None = None, rows: Tensor | None = None, last: Tensor | None = None,
) -> None:  # fmt: skip
    """Chooses `out[r]`: the most likely token at temperature 0, else one drawn with `noise.gumbel_noise`.

    Args:
        logits: [R, V] float32, bfloat16 or float16; rows contiguous.
        temperature: [R] float32, seeds: [R] int64, of any stride. index: [R] int32, which output token each row is.
        out: [R] int64.
        first: the id of the first logit (under tensor parallelism each rank holds a range of ids), a multiple of 4.
        best: [R] float32, gets what each token was chosen by: its logit, or logit / t + noise.
        rows, last: [R] int32 and [any] int32, or neither: `last[rows[r]]` gets the token too.

    Raises:
        KernelError: an argument of the wrong shape, dtype, layout or device; it names the argument.
    """
    check.dims("logits", logits, 2, "[R, V]")
    check.rows("logits", logits)
    count = logits.shape[0]
    arguments = {"temperature": temperature, "seeds": seeds, "index": index, "out": out}
    dtypes = (torch.float32, torch.int64, torch.int32, torch.int64)
    for (name, x), dtype in zip(arguments.items(), dtypes, strict=True):
        check.shape(name, x, (count,))
        check.dtype(name, x, (dtype,))
    for name in ("index", "out"):
        check.contiguous(name, arguments[name])
    if best is not None:
        arguments["best"] = best
        check.shape("best", best, (count,))
        check.dtype("best", best, (torch.float32,))
        check.contiguous("best", best)
    check.cuda(logits=logits, **arguments)
    if first % 4:
        raise KernelError(f"first is {first}; expected a multiple of 4, the ids that share a draw")
    if count:
        from minisgl.kernels.sample import triton_v1

        triton_v1.run(logits, temperature, seeds, index, out, first, best, rows, last)
