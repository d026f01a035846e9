"""The FastAPI application: routers, and one shape for every error.

Endpoints are plain functions: Starlette runs them in threads, so that neither the store nor the engine ever
blocks the event loop.
"""

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ringstone.api import attachments, gateway, pools, reactors, snapshots, stats, volumes
from ringstone.api.context import ApiContext
from ringstone.errors import InvalidError, RingstoneError
from ringstone.models import ErrorBody

log = logging.getLogger("ringstone.api")

_ERRORS: dict[int | str, dict[str, object]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be done; nothing has changed."},
    "5XX": {"model": ErrorBody, "description": "The host, its storage or the gateway failed."},
}


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
        responses=_ERRORS,
    )
    app.state.context = context
    nouns = (pools, volumes, snapshots, attachments, reactors, stats, gateway)
    for router in (noun.router for noun in nouns):
        app.include_router(router, prefix="/v1")
    app.add_exception_handler(RingstoneError, _known)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unknown)
    return app


def _answer(status: int, code: str, message: str) -> JSONResponse:
    return JSONResponse(ErrorBody(code=code, message=message).model_dump(), status_code=status)


async def _known(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RingstoneError)
    if error.http_status >= 500:
        log.error("%s", error)
    return _answer(error.http_status, error.code, error.message)


async def _malformed(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    parts = [f"{'.'.join(map(str, item['loc'][1:])) or 'the body'}: {item['msg']}" for item in error.errors()]
    message = (
        f"The request is not valid ({'; '.join(parts)}). Correct it and try again; GET "
        "/v1/openapi.json has its form."
    )
    return _answer(InvalidError.http_status, InvalidError.code, message)


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = "not_found" if error.status_code == 404 else "invalid"
    message = (
        f"{request.method} {request.url.path} is not part of this API ({error.detail}); GET "
        "/v1/openapi.json lists what is."
    )
    return _answer(error.status_code, code, message)


async def _unknown(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _answer(
        500,
        "internal",
        f"The gateway failed: {type(error).__name__}. Its log has the details; please report them.",
    )
