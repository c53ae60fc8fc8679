"""filter: masks the logits that top-k, top-p and min-p exclude.

What is kept is the beginning of a row's tokens in order of logit, then of id: top-k says how many; top-p as many as it
takes for their share of what top-k left to reach p; min-p those at least that fraction as likely as the most likely.

Shares are sums of whole numbers, exp((logit - largest) / t) · 2^40 rounded down: they don't depend on the order of
addition, so a sort and a search for the threshold keep the same tokens, and so does every rank. Ids settle ties.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minisgl.kernels import check

ONE = 2.0**40  # the most likely token's weight; 2^18 such tokens still fit 64 bits
_NEVER = float("-inf")


def filter_logits(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> None:
    """Sets what is excluded to -inf, in place. The most likely token always stays; at temperature 0 all do.

    Args:
        logits: [R, V] float32, bfloat16 or float16; rows contiguous. Temperature isn't applied yet.
        temperature, top_p, min_p: [R] float32; 1 and above switches top-p off, 0 min-p. top_k: [R] int32, 0 for off.
            On a GPU these four are views of one tensor, with one stride.

    Raises:
        KernelError: an argument of the wrong shape, dtype, layout or device; it names the argument.
    """
    check.dims("logits", logits, 2, "[R, V]")
    check.rows("logits", logits)
    for name, x in {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}.items():
        check.shape(name, x, logits.shape[:1])
        check.dtype(name, x, (torch.int32 if name == "top_k" else torch.float32,))
    if not logits.is_cuda:
        reference(logits, temperature, top_k, top_p, min_p)
    elif logits.shape[0]:
        from minisgl.kernels.sample import triton_filter

        triton_filter.run(logits, temperature, top_k, top_p, min_p)


def reference(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> None:
    """The definition, by a sort."""
    vocab = logits.shape[1]
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.float()
    share = ((ordered - ordered[:, :1]) / torch.where(temperature == 0, 1.0, temperature)[:, None]).exp()
    k = torch.where(top_k > 0, top_k, vocab)[:, None]
    weights = (share * ONE).long().masked_fill(torch.arange(vocab, device=logits.device) >= k, 0)
    before = weights.cumsum(-1) - weights
    target = (top_p.double() * weights.sum(-1)).ceil()[:, None]
    outside = (torch.arange(vocab, device=logits.device) >= k) | ((before >= target) & (top_p < 1)[:, None])
    outside |= share < min_p[:, None]
    outside[:, 0] = False
    outside &= (temperature > 0)[:, None]
    logits.masked_fill_(torch.empty_like(outside).scatter_(1, ids, outside), _NEVER)
