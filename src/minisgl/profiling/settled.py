"""When an engine's steps begin to be alike."""

from __future__ import annotations

from minisgl.engine.scheduler import Scheduler


def only_decodes(scheduler: Scheduler) -> bool:
    """Whether every request runs and has its prompt behind it."""
    computed = scheduler.ledger.computed
    return not scheduler.waiting and all(len(r.tokens) - computed[r.row] <= 1 for r in scheduler.running)
