"""The HTTP routes."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from minisgl.server import capture, jobs, protocol
from minisgl.server.answer import GenerationResponse
from minisgl.server.errors import ErrorBody, install_handlers, json_response
from minisgl.server.formats import ChatFormat, CompletionFormat
from minisgl.server.gate import Gate
from minisgl.server.responses import Aborted, Answer, Detokenized, Health, ModelCard, ModelList, Profile, Tokens
from minisgl.server.service import Service

_TYPES = (Aborted, Answer, Detokenized, ErrorBody, Health, ModelCard, ModelList, Profile, Tokens)
_SCHEMAS, _COMPONENTS = msgspec.json.schema_components(_TYPES, ref_template="#/components/schemas/{name}")


def _answers(kind: type, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """What a route answers, for the OpenAPI document."""
    content: dict[str, Any] = {"application/json": {"schema": _SCHEMAS[_TYPES.index(kind)]}}
    return {200: {"content": content | ({"text/event-stream": {}} if stream else {})}}


_failed = {"content": {"application/json": {"schema": _SCHEMAS[_TYPES.index(ErrorBody)]}}}
router = APIRouter(
    responses={"4XX": {"description": "Refused", **_failed}, "5XX": {"description": "Failed", **_failed}}
)


def create_app(service: Service) -> FastAPI:
    app = FastAPI(title="minisgl", description="An OpenAI-compatible server for one model.")
    app.state.service = service
    app.include_router(router)
    app.add_middleware(Gate, api_key=service.config.api_key)
    if service.config.cors is not None:
        origins = [origin.strip() for origin in service.config.cors.split(",")]
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    install_handlers(app)
    app.openapi()["components"]["schemas"] |= _COMPONENTS  # made once, and kept
    return app


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


@router.post("/v1/chat/completions", responses=_answers(Answer, stream=True))
async def chat_completions(body: protocol.ChatCompletionRequest, request: Request) -> Response:
    """Answers a conversation."""
    job = await jobs.chat_job(_service(request), body)
    return GenerationResponse(job, ChatFormat(job))


@router.post("/v1/completions", responses=_answers(Answer, stream=True))
async def completions(body: protocol.CompletionRequest, request: Request) -> Response:
    """Continues one prompt or several."""
    job = await jobs.completion_job(_service(request), body)
    return GenerationResponse(job, CompletionFormat(job))


@router.post("/tokenize", responses=_answers(Tokens))
async def tokenize(body: protocol.TokenizeRequest, request: Request) -> Response:
    """The token ids of a text, or of a conversation as the model's template renders it."""
    return json_response(await jobs.tokenize(_service(request), body))


@router.post("/detokenize", responses=_answers(Detokenized))
async def detokenize(body: protocol.DetokenizeRequest, request: Request) -> Response:
    """The text of token ids."""
    return json_response(await jobs.detokenize(_service(request), body))


@router.post("/abort", responses=_answers(Aborted))
async def abort(body: protocol.AbortRequest, request: Request) -> Response:
    """Ends an answer under way; what there is of it goes to its client, with the finish reason abort."""
    return json_response(Aborted(_service(request).backend().client.abort(body.request_id)))


@router.post("/profile/start", responses=_answers(Profile))
async def profile_start(request: Request) -> Response:
    """Begins a capture of where time goes, in the server and the engine; for a server started with --profile."""
    service = _service(request)
    await capture.start(service.capture, service.backend().client)
    return json_response(Profile(True))


@router.post("/profile/stop", responses=_answers(Profile))
async def profile_stop(request: Request) -> Response:
    """Ends the capture, and writes it as a trace that Perfetto and Chrome load."""
    service = _service(request)
    return json_response(Profile(False, await capture.stop(service.capture, service.backend().client)))


@router.get("/v1/models", responses=_answers(ModelList))
async def models(request: Request) -> Response:
    """The one model that is served."""
    return json_response(ModelList([_card(_service(request))]))


@router.get("/v1/models/{model:path}", responses=_answers(ModelCard))
async def model(model: str, request: Request) -> Response:
    """The model, if it is the one that is served."""
    _service(request).check_model(model)
    return json_response(_card(_service(request)))


@router.get("/health", responses=_answers(Health))
async def health(request: Request) -> Response:
    """200 when requests are served, 503 before and after."""
    report = _service(request).health()
    ok = report.status == "ok"
    return json_response(report, 200 if ok else 503)


@router.get("/metrics", responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    registry = _service(request).backend().client.metrics.registry
    return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})


def _card(service: Service) -> ModelCard:
    loaded = service.loaded
    return ModelCard(service.model_name, None if loaded is None else loaded.limits.max_total_tokens)
