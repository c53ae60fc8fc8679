"""What spans cost a decode step while nobody profiles: the engine as it is against one whose spans are cut out.

    python benchmarks/bench_spans.py [--model smollm2] [--device auto] [--rounds 40] [--no-save]

The spans are cut out of the methods' source, and both engines are one: the methods change places between samples, in
turns. A model of one tiny layer is measured beside the real one, since its step is the shortest that there is; the real
one gets a quarter of the rounds. The third arm has a recorder at work, on every operator too: what a capture costs.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import statistics
import tempfile
import textwrap
import time
import timeit
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import append_line, environment

from minisgl.config import EngineConfig
from minisgl.engine.engine import Engine
from minisgl.engine.ledger import PageLedger
from minisgl.engine.runner import ModelRunner
from minisgl.profiling.decoder_marks import watch_operators
from minisgl.profiling.spans import Recorder
from minisgl.profiling.statistics import gain_of, interleave
from minisgl.timing import set_span_hook, span
from minisgl.types import SamplingParams

STEPS = 40  # a sample
CONTEXT = 64
TINY = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 1_000_000,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


class Cut(ast.NodeTransformer):
    """Leaves of `with span(…): body` the body."""

    def visit_With(self, node: ast.With) -> Any:
        self.generic_visit(node)
        calls = [item.context_expr for item in node.items]
        spans = [isinstance(c, ast.Call) and isinstance(c.func, ast.Name) and c.func.id == "span" for c in calls]
        return node.body if all(spans) else node


def without_spans(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, of a module's namespace, with its spans cut out."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    namespace: dict[str, Any] = {}
    inner = inspect.unwrap(function)
    code = compile(ast.fix_missing_locations(Cut().visit(tree)), inspect.getfile(inner), "exec")
    scope = {**inner.__globals__}
    exec(code, scope, namespace)
    made: Callable[..., Any] = namespace[function.__name__]
    assert "span" not in inspect.unwrap(made).__code__.co_names
    return made


def pairs() -> list[tuple[type, str, Callable[..., Any], Callable[..., Any]]]:
    """Class and name of each method with spans, as it is and without them."""
    methods = (
        (c, n, f) for c in (Engine, ModelRunner, PageLedger) for n, f in vars(c).items() if inspect.isfunction(f)
    )
    found = [(c, n, f, without_spans(f)) for c, n, f in methods if "with span(" in inspect.getsource(f)]
    assert {n for _, n, _, _ in found} >= {"step", "_collect", "_launch_eager", "_launch_graph", "admit"}
    return found


def loop_with_spans(engine: Engine) -> None:
    """A step with the spans that the engine process puts around it."""
    with span("apply"):
        pass
    with span("step"):
        engine.step()
    with span("send"):
        pass


def sample(engine: Engine, step: Callable[[Engine], Any]) -> float:
    """Microseconds a step, the median of some: what else the machine does hits few of them."""
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        step(engine)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def span_ns() -> float:
    """Nanoseconds of one span while nobody profiles, and of the loop around it: the best of several."""
    return min(timeit.repeat("with span('a'): pass", globals={"span": span}, number=100_000, repeat=20)) * 1e4


def measure(engine: Engine, rounds: int) -> dict[str, list[float]]:
    prompt = array("i", range(1, CONTEXT + 1))
    most = (rounds + 1) * 3 * STEPS + 100
    params = SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=True).resolve({}, ())
    engine.add("only", prompt, params)
    for _ in range(20):
        engine.step()
    methods, bare_loop = pairs(), without_spans(loop_with_spans)

    def off() -> float:
        return sample(engine, loop_with_spans)

    def removed() -> float:
        for owner, name, _, cut in methods:
            setattr(owner, name, cut)
        try:
            return sample(engine, bare_loop)
        finally:
            for owner, name, whole, _ in methods:
                setattr(owner, name, whole)

    def recording() -> float:
        recorder = Recorder("engine")
        set_span_hook(recorder.span)
        remove = watch_operators(engine.model, engine.runner.attention, recorder.mark)
        try:
            return sample(engine, loop_with_spans)
        finally:
            remove()
            set_span_hook(None)

    samples = interleave({"off": off, "removed": removed, "recording": recording}, rounds)
    engine.abort("only")
    engine.step()
    return samples


def report(name: str, engine: Engine, rounds: int, save: bool) -> None:
    samples = measure(engine, rounds)
    middle = {arm: sorted(times)[len(times) // 2] for arm, times in samples.items()}
    off, recording = gain_of(samples["off"], samples["removed"]), gain_of(samples["recording"], samples["off"])
    print(f"{name}, decode step of one request ({engine.config.device}, attention {engine.config.attention})")
    print(f"  spans removed  {middle['removed']:10,.1f} µs")
    print(f"  spans off      {middle['off']:10,.1f} µs   removing them gives {off.estimate:+.2%} "
          f"[{off.low:+.2%}, {off.high:+.2%}]; {off.detectable:.2%} would have shown")  # fmt: skip
    print(f"  recording      {middle['recording']:10,.1f} µs   not recording gives {recording.estimate:+.2%} "
          f"[{recording.low:+.2%}, {recording.high:+.2%}]")  # fmt: skip
    if save:
        figures = {"us": middle, "gain_of_removing": [off.estimate, off.low, off.high], "detectable": off.detectable}
        line = {"bench": "spans", "model": name, "rounds": rounds, "attention": engine.config.attention, **figures}
        append_line("engine.jsonl", environment(engine.config.device) | line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    room = CONTEXT + (args.rounds + 1) * 3 * STEPS + 200
    options = {"device": args.device, "max_running": 1, "num_pages": room // 16 + 2}
    save = not args.no_save
    print(f"one span while nobody profiles: {span_ns():.0f} ns; a decode step has eight")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(TINY))
        tiny = Engine(EngineConfig(model=folder, dummy_weights=True, **options))
        report("one tiny layer", tiny, args.rounds, save)
    report(args.model, Engine(EngineConfig(model=args.model, **options)), max(args.rounds // 4, 5), save)


if __name__ == "__main__":
    main()
