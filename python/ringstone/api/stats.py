"""/v1/stats"""

from dataclasses import replace

from fastapi import APIRouter

from ringstone.api.context import ContextDep
from ringstone.stats import Snapshot

router = APIRouter(prefix="/stats", tags=["stats"])


@router.get("")
def show_stats(context: ContextDep, volume: str | None = None) -> Snapshot:
    """Counters since each queue was attached; rates are the difference of two answers. Histograms map a
    bucket (docs/formats/stats-page.md) to its count, empty ones left out."""
    snapshot = context.stats.read()
    if volume is None:
        return snapshot
    queues = snapshot.of_volume(volume)
    if not queues:
        # NotFoundError for one that does not exist. What is served is told without the state.
        context.service.store.volume(volume)
    return replace(snapshot, queues=queues)
