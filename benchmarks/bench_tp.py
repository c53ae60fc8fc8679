"""What tensor parallelism costs a step beside the model and its collectives: the message between the ranks.

    python benchmarks/bench_tp.py [--ranks N] [--steps N] [--no-save]

On a CPU, with a tiny model: the ranks' processes, sockets and engines are the real ones. From rank 0's beginning to
encode a message until a rank has received, decoded and applied it, and begins to schedule, is `behind`; a rank that was
still computing the step before counts from the end of that. `send` is rank 0's part: encode, and write to every
socket. Goal: `behind` below 0.2 ms, with one rank a core; a message below 4 KB with 256 requests running.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from array import array
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import bench_tp  # as the ranks import it: what they run can't lie in a main script
import numpy as np
from common import append_line, environment, spread

from minisgl.config import EngineConfig
from minisgl.engine import lead, ranks
from minisgl.engine.engine import Engine
from minisgl.engine.lead import LeadEngine
from minisgl.messages import RankStep, Shutdown, encode
from minisgl.types import SamplingParams

MODEL = {
    "model_type": "llama", "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
TIMES = "BENCH_TP_TIMES"  # the folder in which ranks leave theirs
CASES = ((1, 0), (32, 0), (256, 0), (256, 4))  # requests running, requests that join (and leave) in a step
PROMPT = 64  # tokens
GOAL_US, GOAL_BYTES = 200.0, 4096


class TimedLink:
    """A rank's end of its link: notes when the rank began to wait and, with `step`, when it had applied a message.

    All times are of one clock that every process of the machine has.
    """

    def __init__(self, link: Connection, rank: int) -> None:
        self._link, self._rank = link, rank
        self.times: list[tuple[float, float]] = []  # began to wait, begins to schedule
        self._waits = 0.0
        self.send_bytes = link.send_bytes

    def recv_bytes(self) -> bytes:
        self._waits = time.monotonic()
        data = self._link.recv_bytes()
        if data == encode(Shutdown()):
            np.save(Path(os.environ[TIMES]) / f"{self._rank}.npy", np.array(self.times))
        return data

    def step(self) -> None:
        self.times.append((self._waits, time.monotonic()))


def timed_rank(config: EngineConfig, rank: int, folder: str, parent_pid: int, link: Connection) -> None:
    """`rank_main` with a stopwatch."""
    timed, step = TimedLink(link, rank), Engine.step

    def timed_step(engine: Engine) -> Any:
        timed.step()
        return step(engine)

    Engine.step = timed_step  # type: ignore[method-assign]
    ranks.rank_main(config, rank, folder, parent_pid, timed)  # type: ignore[arg-type]


def run_case(folder: Path, size: int, running: int, joining: int, num_steps: int) -> dict[str, Any]:
    """Decodes with `running` requests for `num_steps` steps; times in µs."""
    options = {"device": "cpu", "attention": "torch_sdpa", "dummy_weights": True, "prefix_cache": joining > 0}
    total = running + joining
    config = EngineConfig(
        str(folder), tp_size=size, max_running=total, num_pages=total * 64, max_batched_tokens=32 * total, **options
    )
    original, ranks.rank_main = ranks.rank_main, bench_tp.timed_rank
    try:
        engine = LeadEngine(config)
    finally:
        ranks.rank_main = original
    sent: list[tuple[float, float, int]] = []  # began to encode, had written, bytes
    send = engine._ranks.send

    def timed_send(message: Any) -> int:
        began = time.monotonic()
        count = send(message)
        if isinstance(message, RankStep):
            sent.append((began, time.monotonic(), count))
        return count

    engine._ranks.send = timed_send  # type: ignore[method-assign]
    first = drive(engine, running, joining, num_steps)
    engine.close()
    return summary(sent, size, first) | {"ranks": size, "running": running, "joining": joining}


def drive(engine: LeadEngine, running: int, joining: int, num_steps: int) -> int:
    """The number of steps until all are running; as many as wanted follow."""
    generator, count = np.random.default_rng(0), 0

    def add(num: int, tokens: int) -> None:
        nonlocal count
        for _ in range(num):
            prompt = array("i", generator.integers(0, MODEL["vocab_size"], PROMPT).tolist())
            params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
            engine.add(f"request-{count:032}", prompt, params.resolve({}, ()))
            count += 1

    add(running - joining * 8, 900)
    for _ in range(8):
        add(joining, 8 + count % 8)
    first = 0
    while engine.stats().num_waiting or first < 8:
        engine.step()
        first += 1
    for _ in range(num_steps):
        add(joining, 8)
        engine.step()
    return first


def summary(sent: list[tuple[float, float, int]], size: int, first: int) -> dict[str, Any]:
    """Of all steps from `first` on; `behind` is that of the slowest rank."""
    began, written, count = (np.array(column) for column in zip(*sent, strict=True))
    behind = np.zeros(len(began))
    for rank in range(1, size):
        waits, schedules = np.load(Path(os.environ[TIMES]) / f"{rank}.npy").T
        behind = np.maximum(behind, schedules - np.maximum(waits, began))
    return {
        "send_us": spread(list((written - began)[first:] * 1e6)),
        "behind_us": spread(list(behind[first:] * 1e6)),
        "message_bytes": {"median": int(np.median(count[first:])), "max": int(count[first:].max())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(f"goals: behind below {GOAL_US:.0f} µs a step, a message below {GOAL_BYTES} bytes")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        os.environ[TIMES] = name
        (Path(name) / "config.json").write_text(json.dumps(MODEL))
        for checked in (False, True):
            os.environ[lead.CHECK_VARIABLE] = str(int(checked))
            for running, joining in CASES:
                row = run_case(Path(name), args.ranks, running, joining, args.steps) | {"checked": checked}
                rows.append(row)
                print_row(row)
    if not args.no_save:
        append_line("tp.jsonl", environment("cpu") | {"bench": "tp", "load": os.getloadavg()[0], "rows": rows})


def print_row(row: dict[str, Any]) -> None:
    behind, send, size = row["behind_us"], row["send_us"], row["message_bytes"]
    print(
        f"{row['running']:4} running, {row['joining']} joining{', checked' if row['checked'] else '':9}  "
        f"behind {behind['median']:7.1f} µs ({behind['p10']:.1f} to {behind['p90']:.1f})  "
        f"send {send['median']:6.1f} µs  message {size['median']} bytes, at most {size['max']}",
        flush=True,
    )


if __name__ == "__main__":
    main()
