"""moe: the MLPs of the experts that each token chose, without a word to the host."""

from __future__ import annotations

from torch import Tensor

from minisgl.kernels import check
from minisgl.kernels.spec import FLOATS


def moe(
    x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, out: Tensor, top_k: int, normalise: bool = True,
    add: bool = False,
) -> None:  # fmt: skip
    """out[t] = Σ over t's experts e of p(e) · down[e] · (silu(gate[e] · x[t]) · (up[e] · x[t])).

    A token's experts are the `top_k` most likely under softmax(logits[t]). Activations between the two products and
    each expert's output are rounded to x's dtype; sums and probabilities are float32.

    Args:
        x: [T, H] float32, bfloat16 or float16; rows contiguous.
        logits: [T, E], any of these dtypes; rows contiguous.
        gate_up: [E, 2 I, H], x's dtype: each expert's gate rows, then its up rows. down: [E, H, I], x's dtype.
        out: [T, H], x's dtype, rows contiguous; written, or added to. It mustn't overlap x.
        top_k: experts a token, at most E.
        normalise: whether the probabilities of a token's experts are scaled to sum to 1.
        add: the sum is added to what `out` holds, the residual stream, in float32.

    Raises:
        KernelError: an argument of the wrong shape, dtype, layout or device; it names the argument.
    """
    check.dims("x", x, 2, "[T, H]")
    check.dims("down", down, 3, "[E, H, I]")
    (experts, hidden, inner), tokens = down.shape, x.shape[0]
    shapes = {"logits": (tokens, experts), "gate_up": (experts, 2 * inner, hidden), "out": (tokens, hidden)}
    given = {"x": x, "logits": logits, "gate_up": gate_up, "down": down, "out": out}
    check.shape("x", x, (tokens, hidden))
    for name, y in given.items():
        check.shape(name, y, shapes.get(name, tuple(y.shape)))
        check.dtype(name, y, FLOATS if name == "logits" else (x.dtype,))
        check.contiguous(name, y) if name in ("gate_up", "down") else check.rows(name, y)
    check.cuda(**given)
    if tokens:
        from minisgl.kernels.moe import triton_v1

        triton_v1.run(x, logits, gate_up, down, out, top_k, normalise, add)
