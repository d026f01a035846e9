"""The gateway's FastAPI application: its routers.

Endpoints are plain functions: Starlette runs them in threads, so that neither the store nor the engine ever
blocks the event loop.
"""

from fastapi import FastAPI

from ringstone.api import attachments, gateway, pools, reactors, snapshots, stats, volumes
from ringstone.api.answers import ERRORS, add_error_handlers
from ringstone.api.context import ApiContext
from ringstone.api.health import HealthLook


def build_app(context: ApiContext) -> FastAPI:
    """The application over `context`; it keeps no state of its own."""
    app = FastAPI(
        title="Ringstone gateway",
        version="1",
        description="Pools, volumes and attachments of one host. Sizes are bytes.",
        openapi_url="/v1/openapi.json",
        # The documentation pages load scripts from elsewhere; the schema is what counts.
        docs_url=None,
        redoc_url=None,
        responses=ERRORS,
    )
    app.state.context = context
    app.state.health = HealthLook(lambda: gateway.look_at(context.service))
    nouns = (pools, volumes, snapshots, attachments, reactors, stats, gateway)
    for router in (noun.router for noun in nouns):
        app.include_router(router, prefix="/v1")
    add_error_handlers(app)
    return app
