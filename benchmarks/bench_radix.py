"""The prefix cache: microseconds a call of the C++ tree and of the Python reference, side by side.

    python benchmarks/bench_radix.py [--page-size 16] [--no-save]

Cases, with random token ids: a warm match over two nodes (512 + 384 tokens); a cold match and insert of 384 new tokens
behind 512 cached ones; the eviction of 4,096 tokens from 4,096 leaves of 256 to 512 tokens. Each call is timed alone,
the timer's own cost left in (and printed). The floor of a case is its unavoidable work done by one built-in: comparing
the ids with memcmp, and for the insert copying the new ones, and allocating the array that comes back.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import append_line, environment, spread

from minisgl.cache.prefix import Implementation, PrefixCache, make_prefix_cache

HERE = Path(__file__).parent
SHARED, TAIL = 512, 384  # tokens
LEAVES, EVICTED = 4096, 4096  # leaves; tokens
SAMPLES: dict[Implementation, int] = {"cpp": 2001, "python": 501}


def random_ids(rng: np.random.Generator, size: int) -> array[int]:
    return array("i", rng.integers(0, 150_000, size, dtype=np.int32).tobytes())


def page_range(start: int, count: int) -> array[int]:
    return array("i", range(start, start + count))


def warm_match(cache: PrefixCache, rng: np.random.Generator, samples: int) -> Iterator[Callable[[], object]]:
    """One match a sample, of a path of two nodes."""
    ids, size = random_ids(rng, SHARED + TAIL), cache.page_size
    cache.insert(ids[:SHARED], page_range(0, SHARED // size))
    cache.insert(ids, page_range(0, len(ids) // size))
    for _ in range(samples):
        yield lambda: cache.match(ids)


def cold_insert(cache: PrefixCache, rng: np.random.Generator, samples: int) -> Iterator[Callable[[], object]]:
    """A match that ends after the shared part, then an insert of the whole, with another tail each time."""
    shared, size = random_ids(rng, SHARED), cache.page_size
    prompts = [shared + random_ids(rng, TAIL) for _ in range(samples)]
    cache.insert(shared, page_range(0, SHARED // size))
    for index, ids in enumerate(prompts, start=1):
        pages = page_range(index * len(ids), len(ids) // size)
        yield lambda ids=ids, pages=pages: (cache.match(ids), cache.insert(ids, pages))


def evict_leaves(cache: PrefixCache, rng: np.random.Generator, samples: int) -> Iterator[Callable[[], object]]:
    """An eviction a sample; what went is replaced by new leaves, outside the time measured."""
    size, next_page, full = cache.page_size, 0, 0
    while True:
        while cache.num_pages < full or full == 0 and next_page < LEAVES * TAIL // size:
            ids = random_ids(rng, int(rng.integers(256 // size, 512 // size, endpoint=True)) * size)
            cache.insert(ids, page_range(next_page, len(ids) // size))
            next_page += len(ids) // size
        full = full or cache.num_pages
        if samples == 0:
            return
        samples -= 1
        yield lambda: cache.evict(EVICTED // size)


def floors(page_size: int, rng: np.random.Generator) -> dict[str, Callable[[], object]]:
    """The least that each case must do, as one call of built-ins."""
    ids = random_ids(rng, SHARED + TAIL).tobytes()
    same, shared, tail = bytes(bytearray(ids)), bytes(bytearray(ids[: SHARED * 4])), bytearray(ids[SHARED * 4 :])
    prefix = ids[: SHARED * 4]
    return {
        "warm match": lambda: (ids == same, np.empty((SHARED + TAIL) // page_size, np.int32)),
        "cold match + insert": lambda: (prefix == shared, np.empty(SHARED // page_size, np.int32), tail.copy()),
        "evict": lambda: np.empty(EVICTED // page_size, np.int32),
    }


def measure(calls: Iterator[Callable[[], object]]) -> dict[str, float]:
    """Microseconds a call: median, p10, p90."""
    times = []
    for call in calls:
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return {f"{name}_us": round(value, 3) for name, value in spread([ns / 1000 for ns in times]).items()}


def repeated(call: Callable[[], object], samples: int = 2001) -> Iterator[Callable[[], object]]:
    for _ in range(samples):
        yield call


def run_cases(implementation: Implementation, page_size: int) -> dict[str, dict[str, float]]:
    cases = {"warm match": warm_match, "cold match + insert": cold_insert, "evict": evict_leaves}
    results = {}
    for name, case in cases.items():
        cache = make_prefix_cache(page_size, implementation)
        results[name] = measure(case(cache, np.random.default_rng(0), SAMPLES[implementation]))
    return results


def run_compare() -> list[dict[str, Any]]:
    """The prefix comparison inside C++; empty without g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        return []
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/bench_compare"
        subprocess.run([compiler, "-std=c++20", "-O3", HERE / "bench_compare.cpp", "-o", program], check=True)
        lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def row(name: str, result: dict[str, float], floor: float | None = None) -> str:
    fraction = "" if floor is None else f"{floor / result['median_us']:8.0%}"
    return f"{name:28}{result['median_us']:10.3f}{result['p10_us']:10.3f}{result['p90_us']:10.3f}{fraction}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--page-size", type=int, default=16, help="tokens a page (default: 16)")
    parser.add_argument("--no-save", action="store_true", help="print only; append nothing to results/radix.jsonl")
    args = parser.parse_args()

    print(f"{'microseconds':28}{'median':>10}{'p10':>10}{'p90':>10}{'of floor':>8}")
    print(row("timer", measure(repeated(lambda: None))))
    floor = {n: measure(repeated(f)) for n, f in floors(args.page_size, np.random.default_rng(0)).items()}
    for name, result in floor.items():
        print(row(f"floor: {name}", result))
    results: dict[str, dict[str, dict[str, float]]] = {}
    implementations: tuple[Implementation, ...] = ("cpp", "python")
    for implementation in implementations:
        try:
            results[implementation] = run_cases(implementation, args.page_size)
        except ImportError as error:
            print(f"{implementation}: not measured, {error}")
            continue
        for name, result in results[implementation].items():
            print(row(f"{implementation}: {name}", result, floor[name]["median_us"]))
    compare = run_compare()
    for line in compare:
        print(f"C++ compare, {line['ids']:5} ids, {line['compare']:14}{line['median_ns']:10.1f} ns")
    if not args.no_save:
        record = {"page_size": args.page_size, "floor": floor, "results": results, "compare": compare}
        append_line("radix.jsonl", environment("cpu") | record)


if __name__ == "__main__":
    main()
