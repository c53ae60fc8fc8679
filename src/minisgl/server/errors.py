"""Errors as OpenAI error objects with the right status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from minisgl.types import EngineDeadError, MinisglError, OverloadedError, RequestError

_HEADERS = {503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}  # seconds; the scheme of the key


_STATUS: dict[type[Exception], tuple[int, str | None]] = {
    RequestError: (400, None), OverloadedError: (503, "overloaded"), EngineDeadError: (503, "engine_unavailable"),
}  # fmt: skip


class HttpError(RequestError):
    """A request that is refused with a status or a code of its own."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message, param)
        self.status, self.code = status, code


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    """What every failed request is answered with, and what ends a stream that fails."""

    error: ErrorDetail


def describe(error: Exception) -> tuple[int, ErrorBody]:
    """Status and body for `error`; the text of errors that aren't ours stays in the log."""
    status, code = (error.status, error.code) if isinstance(error, HttpError) else _STATUS.get(type(error), (500, None))
    text = str(error) if isinstance(error, MinisglError) else "internal error, see the log"
    text = text.encode(errors="replace").decode()  # it may quote half a surrogate pair
    kind = "invalid_request_error" if status < 500 else "server_error"
    return status, ErrorBody(ErrorDetail(text, kind, getattr(error, "param", None), code))


def json_response(body: msgspec.Struct, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, "application/json")


def error_response(error: Exception, headers: Mapping[str, str] | None = None) -> Response:
    status, body = describe(error)
    return json_response(body, status, headers or _HEADERS.get(status))


def install_handlers(app: FastAPI) -> None:
    """Gives `app` one answer format for every error."""
    for kind in (MinisglError, RecursionError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _on_error)


async def _on_error(request: Request, error: Exception) -> Response:
    match error:
        case RecursionError():
            error = RequestError("the request is nested too deeply")
        case RequestValidationError():
            error = invalid(error.errors())
        case HTTPException():
            cause = f" ({error.__cause__})" if error.__cause__ else ""  # why a body can't be read
            text = f"{request.method} {request.scope['path']}: {error.detail}{cause}"
            return error_response(HttpError(text, None, error.status_code), error.headers)
    return error_response(error)


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
