"""Where the time of one request went: every moment of it given to exactly one thing.

Spans overlap: they nest, and processes and the GPU work at once. At each moment the one that counts is the innermost
span of whoever the answer waits for: the GPU before the engine, the engine before the server, that before the client.
Of kernels that overlap, the one that began first counts until it ends (`spans.exclusive`).
Once the engine has sent the token that a window ends with, its further work is for later tokens and doesn't count.
What no operator covers is a gap, named by what lies around it. So the pieces of a window add up to its length, always;
how much of it is gaps says how well it is accounted for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

from minisgl.profiling.spans import Span, exclusive, short_name
from minisgl.types import MinisglError

_ORDER = {"gpu": 3, "engine": 2, "server": 1, "client": 0}
_CONTAINERS = ("step", "layers", "layer ", "prefill ", "decode ", "forward")  # what is in them but in no operator: gaps
_CATEGORIES = {
    "apply": "server", "send": "server", "send state": "server", "schedule": "schedule",
    "radix match": "schedule", "radix insert": "schedule",
}  # fmt: skip
NEXT_STEP = "step of the 2nd token"  # launched, and on a CPU computed, before the first one is sent
_BETWEEN = {
    ("client", "server"): "http in",
    ("server", "engine"): "queue",
    ("engine", "server"): "to server",
    ("server", "client"): "http out",
}


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a window. Times in nanoseconds; `category` as in request.json; `step` is prefill, decode or neither."""

    name: str
    start: int
    end: int
    category: str
    process: str
    layer: int | None = None
    step: str = ""

    @property
    def us(self) -> float:
        return (self.end - self.start) / 1e3


def partition(spans: Iterable[Span], start: int, end: int, engine_until: int, engine_from: int = 0) -> list[Piece]:
    """Pieces that follow one another from `start` to `end` without a hole.

    Args:
        engine_until: from here on, what engine and GPU do is for later tokens.
        engine_from: up to here it was for earlier requests.
    """
    clipped = ((_clip(s, start, end, (engine_from, engine_until)), s) for s in exclusive(spans))
    inside = [(*part, s) for part, s in clipped if part is not None]
    on_gpu = any(s.process == "gpu" for *_, s in inside)
    order = _first_token if any(s.name.startswith("prefill ") for *_, s in inside) else _next_token
    times = sorted({start, end, *(first for first, _, _ in inside), *(last for _, last, _ in inside)})
    begun: dict[int, list[tuple[int, Span]]] = {}
    for first, last, s in inside:
        begun.setdefault(first, []).append((last, s))
    pieces: list[Piece] = []
    active: list[tuple[int, Span]] = []
    for at, until in pairwise(times):
        active = [each for each in active if each[0] > at] + begun.get(at, [])
        pieces.append(_piece(sorted((s for _, s in active), key=order), at, until, on_gpu))
    return _name_gaps(_join(pieces))


def _clip(s: Span, start: int, end: int, engine: tuple[int, int]) -> tuple[int, int] | None:
    """The part of a span within the window, if there is any."""
    low, high = engine if s.process in ("engine", "gpu") else (start, end)
    first, last = max(s.start, start, low), min(s.end, end, high)
    return (first, last) if last > first else None


def _next_token(s: Span) -> tuple[float, int, int, bool]:
    """What the answer waits for among spans that are active at the same time: the last in this order."""
    return _ORDER[s.process], s.start, -s.end, not s.name.startswith(_CONTAINERS)


def _first_token(s: Span) -> tuple[float, int, int, bool]:
    """The same up to the first token, which doesn't wait for kernels of the step after it."""
    later = s.process == "gpu" and any(name.startswith("decode ") for name in s.path)
    return (_ORDER["server"] + 0.5 if later else _ORDER[s.process]), *_next_token(s)[1:]


def _piece(active: Sequence[Span], at: int, until: int, on_gpu: bool) -> Piece:
    """`active` in order: the last one counts."""
    if not active:
        return Piece("", at, until, "gap", "")
    inner = active[-1]
    around = inner.path if inner.path else [s.name for s in active if s.thread == inner.thread]
    layer = next((int(name[6:]) for name in reversed(around) if name.startswith("layer ")), None)
    step = next((name.split()[0] for name in around if name.startswith(("prefill ", "decode "))), "")
    if inner.process == "gpu":
        return Piece(operator_of(inner), at, until, "kernel", "gpu", layer, step)
    name = inner.name
    if name.startswith(_CONTAINERS):
        return Piece(f"gap in {name.split()[0]}", at, until, "gap", inner.process, layer, step)
    if on_gpu and "forward" in around:
        return Piece("host launches", at, until, "gap", inner.process, layer, step)
    category = _CATEGORIES.get(name, step or "decode") if inner.process == "engine" else "server"
    return Piece(name, at, until, "network" if inner.process == "client" else category, inner.process, layer, step)


def operator_of(kernel: Span) -> str:
    """The operator that launched a kernel, sampling and collecting among them; the kernel's name where none did."""
    inner = kernel.path[-1] if kernel.path else "forward"
    return short_name(kernel.name) if inner.startswith(_CONTAINERS) else inner


def _join(pieces: Iterable[Piece]) -> list[Piece]:
    """Neighbours that are alike become one."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last is not None and replace(last, start=piece.start, end=piece.end) == piece:
            joined[-1] = replace(last, end=piece.end)
        else:
            joined.append(piece)
    return joined


def _name_gaps(pieces: Sequence[Piece]) -> list[Piece]:
    """Names what no span covers by whose work ends and begins there: between two processes it is the way."""
    named = list(pieces)
    for i, piece in enumerate(pieces):
        if piece.name:
            continue
        before = pieces[i - 1].process if i else "client"
        after = pieces[i + 1].process if i + 1 < len(pieces) else "client"
        way = _BETWEEN.get(("engine" if before == "gpu" else before, "engine" if after == "gpu" else after))
        if way is None:
            named[i] = replace(piece, name=f"gap in {before}", process=before)
        else:
            named[i] = replace(piece, name=way, category="network", process=before)
    return named


# -- one request ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answered:
    """A request as the client saw it. Times in nanoseconds of `time.perf_counter_ns`."""

    sent: int  # before it connected
    first: int  # the first token was there
    last: int
    num_prompt: int
    num_output: int

    @property
    def ttft_ms(self) -> float:
        return (self.first - self.sent) / 1e6

    @property
    def itl_ms(self) -> float:
        """Milliseconds a token after the first."""
        return (self.last - self.first) / 1e6 / max(self.num_output - 1, 1)


@dataclass(frozen=True, slots=True)
class Timeline:
    """A request's two windows, up to its first token and from there to its last, in pieces."""

    request: Answered
    ttft: list[Piece]
    decode: list[Piece]

    def operators(self, window: Sequence[Piece], per: int = 1) -> dict[str, float]:
        """Milliseconds by name, in the order of their first piece; divided by `per`."""
        return {name: sum(p.us for p in group) / 1e3 / per for name, group in by_name(window).items()}

    @property
    def accounted(self) -> float:
        """Share of both windows that isn't gaps."""
        pieces = self.ttft + self.decode
        return 1 - sum(p.us for p in pieces if p.category == "gap") / max(sum(p.us for p in pieces), 1e-9)

    def rows(self) -> list[dict[str, object]]:
        """As request.json has them: pieces of the first window; of the second, decode steps as wholes."""
        found = [_row(list(group), "ttft") for group in ([p] for p in self.ttft)]
        for step, group in groupby(self.decode, lambda p: p.step == "decode"):
            pieces = list(group)
            parts = [pieces] if step else [[p] for p in pieces]
            found += [_row(part, "itl", "decode step" if step else None) for part in parts]
        zero = self.request.sent
        return [row | {"start_us": round((start - zero) / 1e3, 3)} for start, row in found]

    def summary(self) -> dict[str, object]:
        later = max(self.request.num_output - 1, 1)
        ttft, itl = self.operators(self.ttft), self.operators(self.decode, later)
        gaps = [sum(p.us for p in w if p.category == "gap") / 1e3 for w in (self.ttft, self.decode)]
        return {
            "ttft_ms": round(self.request.ttft_ms, 4),
            "itl_ms": round(self.request.itl_ms, 4),
            "accounted": round(self.accounted, 4),
            "ttft_sum_ms": round(sum(ttft.values()), 4),
            "itl_sum_ms": round(sum(itl.values()), 4),
            "ttft_gaps_ms": round(gaps[0], 4),
            "itl_gaps_ms": round(gaps[1] / later, 4),
            "prompt_tokens": self.request.num_prompt,
            "output_tokens": self.request.num_output,
            "operators": {name: {k: round(v, 4) for k, v in w.items()} for name, w in (("ttft", ttft), ("itl", itl))},
        }


def _row(pieces: Sequence[Piece], window: str, name: str | None = None) -> tuple[int, dict[str, object]]:
    first = pieces[0]
    category = first.category if name is None else "decode"
    us = round(sum(p.us for p in pieces), 3)
    layer = first.layer if name is None else None
    return first.start, {
        "span": name or first.name, "start_us": 0.0, "us": us, "category": category, "layer": layer, "window": window,
    }  # fmt: skip


def by_name(window: Sequence[Piece]) -> dict[str, list[Piece]]:
    """The pieces of a window by name. A decode step before the first token is one thing: it belongs to the second."""
    prefilling = any(p.step == "prefill" for p in window)
    groups: dict[str, list[Piece]] = {}
    for piece in window:
        name = NEXT_STEP if prefilling and piece.step == "decode" else piece.name
        groups.setdefault(name, []).append(piece)
    return groups


def timeline(spans: Sequence[Span], request: Answered) -> Timeline:
    """
    Raises:
        MinisglError: the spans hold no token on its way to the client.
    """
    handed_over = (s.start for s in spans if s.name == "send to engine" and s.process == "server")
    begun = min((start for start in handed_over if start > request.sent), default=0)
    ttft = partition(spans, request.sent, request.first, _sent_by(spans, request.first), begun)
    if request.last == request.first:
        return Timeline(request, ttft, [])
    decode = partition(spans, request.first, request.last, _sent_by(spans, request.last))
    return Timeline(request, ttft, decode)


def _sent_by(spans: Sequence[Span], arrived: int) -> int:
    """When the engine had sent the token that the client got at `arrived`: the server may have had it sooner."""
    mine = (s.start for s in spans if s.name == "detokenize" and s.process == "server")
    read = max((start for start in mine if start < arrived), default=0)
    sent = [s.end for s in spans if s.name == "send" and s.process == "engine" and s.start < read]
    if not sent:
        raise MinisglError("the trace holds no token on its way to the client; was the capture running by then?")
    return min(max(sent), read)


# -- on a terminal -------------------------------------------------------------------------------------------------


def render(title: str, pieces: Sequence[Piece], per: int = 1, width: int = 44) -> str:
    """A table of a window: each name with its bar where it lies (the first of them, if many), time, share and calls."""
    start, length = pieces[0].start, max(pieces[-1].end - pieces[0].start, 1)
    total = sum(p.us for p in pieces)
    lines = [f"{title}: {total / per / 1e3:.3f} ms", f"  {'':24} {'ms':>9} {'share':>6} {'pieces':>6}"]
    for name, group in by_name(pieces).items():
        us = sum(p.us for p in group)
        cells = [" "] * width
        for p in group:
            first = min((p.start - start) * width // length, width - 1)
            last = min(max(-((start - p.end) * width // length), first + 1), width)
            cells[first:last] = ["█"] * (last - first)
        lines.append(f"  {name[:24]:24} {us / per / 1e3:9.3f} {us / total:6.1%} {len(group):6}  {''.join(cells)}")
    return "\n".join(lines)
