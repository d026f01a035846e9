"""One shape for every error, of the gateway's API and the manager's."""

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ringstone.errors import InvalidError, NotFoundError, RingstoneError
from ringstone.models import ErrorBody

log = logging.getLogger("ringstone.api")

ERRORS: dict[int | str, dict[str, object]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be done; nothing has changed."},
    "5XX": {"model": ErrorBody, "description": "The host, its storage or the gateway failed."},
}


def add_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(RingstoneError, _known)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unknown)


def answer(error: RingstoneError, status: int | None = None) -> JSONResponse:
    body = ErrorBody(code=error.code, message=error.message)
    return JSONResponse(body.model_dump(), status_code=status or error.http_status)


async def _known(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RingstoneError)
    if error.http_status >= 500:
        log.error("%s", error)
    return answer(error)


async def _malformed(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    parts = [f"{'.'.join(map(str, item['loc'][1:])) or 'the body'}: {item['msg']}" for item in error.errors()]
    message = (
        f"The request is not valid ({'; '.join(parts)}). Correct it and try again; GET "
        "/v1/openapi.json has its form."
    )
    return answer(InvalidError(message))


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = (
        f"{request.method} {request.url.path} is not part of this API ({error.detail}); GET "
        "/v1/openapi.json lists what is."
    )
    kind = NotFoundError if error.status_code == 404 else InvalidError
    return answer(kind(message), error.status_code)


async def _unknown(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return answer(
        RingstoneError(
            f"{request.app.title} failed: {type(error).__name__}. Its log has the details; please report them."
        )
    )
