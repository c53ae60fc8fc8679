"""The HTTP routes."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import Response

from minisgl.server.answer import GenerationResponse
from minisgl.server.errors import NotFoundError, install_handlers, json_response
from minisgl.server.formats import ChatFormat, CompletionFormat
from minisgl.server.jobs import chat_job, completion_job
from minisgl.server.protocol import ChatCompletionRequest, CompletionRequest
from minisgl.server.responses import ModelCard, ModelList
from minisgl.server.service import Service

router = APIRouter()


def create_app(service: Service) -> FastAPI:
    app = FastAPI(title="minisgl", description="An OpenAI-compatible server for one model.")
    app.state.service = service
    app.include_router(router)
    install_handlers(app)
    return app


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
    """Answers a conversation."""
    job = await chat_job(_service(request), body)
    return GenerationResponse(job, ChatFormat(job.backend.text))


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continues one prompt or several."""
    job = await completion_job(_service(request), body)
    return GenerationResponse(job, CompletionFormat(job.backend.text))


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The one model that is served."""
    return json_response(ModelList([_card(_service(request))]))


@router.get("/v1/models/{model:path}")
async def model(model: str, request: Request) -> Response:
    """The model, if it is the one that is served."""
    service = _service(request)
    if model != service.model_name:
        raise NotFoundError(f"the model {model!r} is not served here, only {service.model_name!r}", "model")
    return json_response(_card(service))


@router.get("/health")
async def health(request: Request) -> Response:
    """200 when requests are served, 503 before and after."""
    report = _service(request).health()
    ok = report.status == "ok"
    return json_response(report, HTTPStatus.OK if ok else HTTPStatus.SERVICE_UNAVAILABLE)


def _card(service: Service) -> ModelCard:
    loaded = service.loaded
    return ModelCard(service.model_name, None if loaded is None else loaded.limits.max_total_tokens)
