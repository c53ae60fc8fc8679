"""The reports: Markdown pages, plots and one HTML file, rendered from records and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minisgl.profiling.compare import load_runs
from minisgl.profiling.report import final, guide, html, kernels, machine
from minisgl.profiling.report.markdown import section, table
from minisgl.profiling.report.sources import KINDS, SCRIPTS, Sources, command, gather, slug
from minisgl.types import MinisglError

TITLE = "minisgl: the kernel laboratory's reports"
ABOUT = {
    "final-report.md": "what binds each kernel, what optimizations gave, where a request and a step spend their time",
    "analysis.md": "every kernel: how it executes, tables, rooflines, versions",
    "environment.md": "the machine, its ceilings, and what the figures rest on",
    "kernel-dev-guide.md": "how to add, version, test and measure a kernel",
}


def write_reports(folders: Sequence[Path], target: Path) -> list[Path]:
    """Renders every page from the records in `folders` into `target`, with plots/ and report.html.

    Raises:
        MinisglError: no folder holds a record, a package is missing, or a file can't be written.
    """
    sources = gather(folders)
    if not sources.records:
        raise MinisglError(f"no record in {', '.join(map(str, folders))}; `minisgl profile env` writes the first")
    pages = {
        "final-report.md": final.render(sources),
        "analysis.md": kernels.render(sources),
        "environment.md": machine.render(sources),
        "kernel-dev-guide.md": guide.render(),
    }
    pages = {"INDEX.md": _index(sources), **pages}
    files = {name: f"{text.strip()}\n" for name, text in pages.items()}
    files |= {f"plots/{name}": svg for name, svg in sources.plots.items()}
    files["report.html"] = html.page(TITLE, pages, sources.plots)
    return _write(target, files)


def keep(run: Path, data: Path) -> Path:
    """Copies a run's records to the folder of its machine under `data`, in place of its earlier ones.

    Raises:
        MinisglError: the run holds no record.
    """
    records = load_runs(run)
    if not records:
        raise MinisglError(f"{run} holds no record; `minisgl profile env --out {run}` writes the first")
    folder = data / slug(next(iter(records.values())))
    for record in records.values():
        record.write(folder)
    return folder


def _write(target: Path, files: dict[str, str]) -> list[Path]:
    try:
        (target / "plots").mkdir(parents=True, exist_ok=True)
        for old in (target / "plots").glob("*.svg"):
            old.unlink()
        for name, text in files.items():
            (target / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise MinisglError(f"can't write the reports to {target}: {error.strerror}") from None
    return [target / name for name in files]


def _index(sources: Sources) -> str:
    links = "\n".join(f"- [{name.removesuffix('.md')}]({name}): {about}" for name, about in ABOUT.items())
    lines = []
    for kind in KINDS:
        record = sources.get(kind)
        state = "not measured" if record is None else f"{len(record.rows)} rows, {len(record.skipped)} left out"
        lines.append((kind, state, f"`{SCRIPTS.get(kind, command(kind))}`", record.hardware["name"] if record else "–"))
    return section(
        TITLE,
        "Every figure on these pages is rendered from the JSON that the laboratory's commands write; `report.html` has "
        "all pages in one file. `scripts/06_full_pipeline.sh` measures a machine and renders them.",
        links,
        section("What was measured", table(("what:", "state:", "measured by:", "machine:"), lines)),
        level=1,
    )
