"""`kernel-dev-guide.md`: how to add, version, test and measure a kernel; its table comes from the registry."""

from __future__ import annotations

from importlib.resources import files

from minisgl.profiling.report.markdown import table


def render() -> str:
    """The whole page."""
    from minisgl.profiling.catalogue import catalogue

    lines = [
        (f"`{name}`", ", ".join(f"{v.name} ({v.kind})" for v in spec.versions), ", ".join(spec.sizes), len(spec.cases))
        for name, spec in sorted(catalogue().items())
    ]
    head = ("kernel:", "versions, best first:", "sizes that a version knows:", "shapes tested")
    text = (files("minisgl.profiling.report") / "guide.md").read_text(encoding="utf-8")
    return text.replace("{kernels}", table(head, lines))
