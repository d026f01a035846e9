"""What the endpoints work on, given to them by dependency."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from ringstone.gateway.config import GatewayConfig
from ringstone.gateway.handover import Upgrade
from ringstone.gateway.service import Service
from ringstone.stats import StatsPage


@dataclass(frozen=True, slots=True)
class ApiContext:
    """`started_ns` is CLOCK_REALTIME."""

    config: GatewayConfig
    service: Service
    stats: StatsPage
    engine_version: str
    started_ns: int
    # How this process came to serve, when it took over from another.
    upgrade: Upgrade | None = None


# Not plain functions, which would take a thread each: the health must not wait for one.


async def _context(request: Request) -> ApiContext:
    context = request.app.state.context
    assert isinstance(context, ApiContext)
    return context


async def _service(request: Request) -> Service:
    return (await _context(request)).service


ContextDep = Annotated[ApiContext, Depends(_context)]
ServiceDep = Annotated[Service, Depends(_service)]
