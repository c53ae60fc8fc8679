"""Errors as OpenAI error objects with the right status."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from minisgl.types import EngineDeadError, MinisglError, OverloadedError, RequestError

RETRY_AFTER_S = 1


class NotFoundError(RequestError):
    """A model that isn't served here."""


class ContextLengthError(RequestError):
    """A prompt or an answer beyond the model's context."""


class UnauthorizedError(RequestError):
    """A request without the right key."""


class TooLargeError(RequestError):
    """A body beyond the limit."""


# Status and OpenAI's code of each error; the nearest base class counts.
_STATUS: dict[type, tuple[HTTPStatus, str | None]] = {
    NotFoundError: (HTTPStatus.NOT_FOUND, "model_not_found"),
    ContextLengthError: (HTTPStatus.BAD_REQUEST, "context_length_exceeded"),
    UnauthorizedError: (HTTPStatus.UNAUTHORIZED, "invalid_api_key"),
    TooLargeError: (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "request_too_large"),
    RequestError: (HTTPStatus.BAD_REQUEST, None),
    OverloadedError: (HTTPStatus.SERVICE_UNAVAILABLE, "overloaded"),
    EngineDeadError: (HTTPStatus.SERVICE_UNAVAILABLE, "engine_unavailable"),
    Exception: (HTTPStatus.INTERNAL_SERVER_ERROR, None),
}
_HEADERS = {
    HTTPStatus.SERVICE_UNAVAILABLE: {"Retry-After": str(RETRY_AFTER_S)},
    HTTPStatus.UNAUTHORIZED: {"WWW-Authenticate": "Bearer"},
}


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    """What every failed request is answered with, and what ends a stream that fails."""

    error: ErrorDetail


def describe(error: Exception) -> tuple[HTTPStatus, ErrorBody]:
    """Status and body for `error`; the text of errors that aren't ours stays in the log."""
    if isinstance(error, RecursionError):
        error = RequestError("the request is nested too deeply")
    status, code = next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)
    text = str(error) if isinstance(error, MinisglError) else "internal error, see the log"
    text = text.encode(errors="replace").decode()  # it may quote half a surrogate pair
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    return status, ErrorBody(ErrorDetail(text, kind, getattr(error, "param", None), code))


def json_response(body: msgspec.Struct, status: int = HTTPStatus.OK, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, "application/json")


def error_response(error: Exception) -> Response:
    status, body = describe(error)
    return json_response(body, status, _HEADERS.get(status))


def install_handlers(app: FastAPI) -> None:
    """Gives `app` one answer format for every error."""
    handlers: dict[type[Exception], Callable[[Request, Any], Awaitable[Response]]] = {
        MinisglError: _on_error,
        RecursionError: _on_error,
        Exception: _on_error,
        HTTPException: _on_http_error,
        RequestValidationError: _on_invalid,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


async def _on_error(_: Request, error: Exception) -> Response:
    return error_response(error)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    cause = f" ({error.__cause__})" if error.__cause__ else ""  # why a body can't be read, such as its depth
    message = f"{request.method} {request.scope['path']}: {error.detail}{cause}"
    body = ErrorBody(ErrorDetail(message, "invalid_request_error"))
    return json_response(body, error.status_code, dict(error.headers or {}))


async def _on_invalid(_: Request, error: RequestValidationError) -> Response:
    return error_response(invalid(error.errors()))


def invalid(errors: Sequence[Any]) -> RequestError:
    """The first field that failed validation, with everything that was expected there."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return RequestError(f"the body is not valid JSON: {first['ctx']['error']} at position {first['loc'][-1]}")
    path = _field(first["loc"])
    if not path:
        return RequestError("the body must be a JSON object, sent with the header Content-Type: application/json")
    expected = dict.fromkeys(e["msg"] for e in errors if _field(e["loc"]) == path)
    return RequestError(f"{path}: {'; or '.join(expected)}", path.split(".")[0])


def _field(location: Sequence[str | int]) -> str:
    """The field a validation error is about, without 'body' and up to the branches of a union."""
    known = []
    for part in location[1:]:
        if isinstance(part, str) and (part in _UNION_BRANCHES or not part.isidentifier()):
            break
        known.append(str(part))
    return ".".join(known)


_UNION_BRANCHES = {"str", "int", "float", "bool"}
