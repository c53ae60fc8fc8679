"""`minisgl profile kernels`: every registered kernel against its reference."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from minisgl.cli.lab import page
from minisgl.types import ConfigError, KernelError

if TYPE_CHECKING:
    import torch

    from minisgl.kernels.spec import KernelSpec, Shape, Version
    from minisgl.profiling.record import Record

HELP = "check every registered kernel against its reference"
Job = tuple[str, str]  # kernel, version
Checked = tuple[list[dict[str, Any]], list[dict[str, str]]]
INTERPRET = "TRITON_INTERPRET"


def add_options(parser: argparse.ArgumentParser) -> None:
    page.add_common(parser)
    parser.add_argument("--kernels", metavar="NAMES", help="check these alone (names with commas between)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random inputs (default: 0)")
    parser.add_argument(
        "--jobs", type=int, metavar="N",
        help="processes, which compile at once (default: 1; with a GPU half as many as cores, up to 8)",
    )  # fmt: skip
    parser.add_argument(
        "--interpret", action="store_true", help="without a GPU, run Triton's kernels under its interpreter (slow)"
    )


def run(args: argparse.Namespace) -> None:
    """Prints a row a kernel, version and dtype; writes kernels.json.

    Raises:
        ConfigError: a kernel that there isn't.
        SystemExit: code 1, if a kernel is wrong.
    """
    if args.interpret:
        os.environ[INTERPRET] = "1"  # read when triton is imported, which is later
    from minisgl.profiling.catalogue import catalogue
    from minisgl.profiling.record import new_record

    record = new_record("kernels", args.quick)
    known = catalogue()
    names = args.kernels.split(",") if args.kernels else list(known)
    if unknown := set(names) - set(known):
        raise ConfigError(f"--kernels names {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    jobs = [(name, version.name) for name in names for version in known[name].versions]
    options = {name: getattr(args, name) for name in ("quick", "seed", "interpret")}
    rows: list[dict[str, Any]] = []
    with page.progress("kernels", len(jobs)) as advance:
        for found, skipped in _all(partial(_checked, options), jobs, _processes(args.jobs, record)):
            rows += found
            for note in skipped:
                record.skip(**note)
            advance()
    columns = ("kernel:", "version:", "kind:", "dtype:", "cases", "largest error", "tolerance", "verdict:")
    page.table("kernels against their references", columns, summarise(rows))
    page.finish(replace(record, rows=rows), args.out)
    wrong = [row for row in rows if not row["ok"]]
    for row in wrong:
        print(f"{row['kernel']} {row['version']} {row['dtype']} {row['case']}: {row['problem']}", file=sys.stderr)
    if wrong:
        sys.exit(1)


def _processes(asked: int | None, record: Record) -> int:
    if asked is not None:
        return max(asked, 1)
    return 1 if record.hardware["cuda"] is None else min(8, max(record.hardware["num_cores"] // 2, 1))


def _all(check: Callable[[Job], Checked], jobs: Sequence[Job], processes: int) -> Iterator[Checked]:
    """The results in the order of `jobs`. Most of the time goes into compiling, which processes do at once."""
    if processes == 1:
        yield from map(check, jobs)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:  # CUDA doesn't survive a fork
        yield from pool.map(check, jobs)


def _checked(options: dict[str, Any], job: Job) -> Checked:
    """Checks one version, in whatever process: its rows, and notes of what can't run."""
    from minisgl.profiling.catalogue import catalogue
    from minisgl.profiling.record import new_record

    record = new_record("kernels", options["quick"])
    spec = catalogue()[job[0]]
    return check(spec, spec.version(job[1]), record, argparse.Namespace(**options)), record.skipped


def check(spec: KernelSpec, version: Version, record: Record, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each case and dtype of one version; what can't run is noted in `record`."""
    cuda = record.hardware["cuda"]
    if version.kind in ("cuda", "triton") and cuda is None and not (args.interpret and version.kind == "triton"):
        more = "; --interpret runs Triton's kernels on the CPU" * (version.kind == "triton")
        record.skip(f"{spec.name} {version.name}", f"needs an NVIDIA GPU: {record.hardware['no_cuda_reason']}{more}")
        return []
    where = tuple(cuda["capability"]) if cuda else (0, 0)
    rows = []
    for dtype in spec.tolerance:
        for shape in spec.cases[:2] if args.quick else spec.cases:
            reason = version.supports(where, dtype, {**dict.fromkeys(spec.sizes, 16), **shape})
            row = None if reason else _row(spec, version, shape, dtype, record, args.seed)
            if row is not None:
                rows.append(row)
            elif reason:
                record.skip(f"{spec.name} {version.name}", reason)
    return rows


def _row(
    spec: KernelSpec, version: Version, shape: Shape, dtype: torch.dtype, record: Record, seed: int
) -> dict[str, Any] | None:
    """One case; None for a call that this version can't serve, or that the interpreter has nothing to do for."""
    import torch

    from minisgl.profiling.correctness import verify

    on_gpu = record.hardware["cuda"] is not None
    interpreted = version.kind == "triton" and not on_gpu
    case = {n: min(size, 9) if interpreted and n == "tokens" else size for n, size in shape.items()}
    if interpreted and not case["tokens"]:
        return None
    call = _interpreted(spec, version, dtype, case) if interpreted else _called(spec, version)
    device = torch.device("cuda" if on_gpu and version.kind != "cpu" else "cpu")
    about = {"kernel": spec.name, "version": version.name, "kind": version.kind, "case": case}
    about["dtype"] = str(dtype).removeprefix("torch.")
    try:
        outcome = verify(spec, call, case, dtype, device, seed, slack=2.0 if interpreted else 1.0)
    except Exception as error:
        if (isinstance(error, KernelError) and "doesn't fit" in str(error)) or _interpreters(error):
            record.skip(f"{spec.name} {version.name}", str(error))
            return None
        # one that breaks mustn't hide what the others are
        problem = f"{type(error).__name__}: {error}"
        return {**about, "error": None, "tolerance": spec.tolerance[dtype], "ok": False, "problem": problem}
    result = {"error": outcome.error, "tolerance": outcome.tolerance, "ok": outcome.ok, "problem": outcome.problem}
    return {**about, **result}


def _interpreters(error: Exception) -> bool:
    """Whether Triton's interpreter failed, which can't run all that the compiler can; triton may be absent."""
    return type(error).__name__ == "InterpreterError"


def _called(spec: KernelSpec, version: Version) -> Callable[..., object]:
    return lambda *args: spec.run(*args, version=version.name)


def _interpreted(spec: KernelSpec, version: Version, dtype: torch.dtype, shape: Shape) -> Callable[..., object]:
    from minisgl.kernels.tuning import Config

    start = version.prepare(-1, dtype, shape, Config(128, 1))
    if spec.name == "rmsnorm":  # its versions take the residual of add_rmsnorm too
        return lambda x, weight, eps, out: start(x, None, weight, eps, out)
    return start


def summarise(rows: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    """A line a kernel, version and dtype."""
    groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["version"], row["kind"], row["dtype"]), []).append(row)
    lines: list[tuple[object, ...]] = []
    for key, group in groups.items():
        bad = sum(not row["ok"] for row in group)
        error = max((row["error"] for row in group if row["error"] is not None), default=float("nan"))
        tolerance = max(row["tolerance"] for row in group)
        lines.append((*key, len(group), f"{error:.2g}", f"{tolerance:.2g}", f"{bad} wrong" if bad else "right"))
    return lines
