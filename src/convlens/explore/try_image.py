"""Routes of the part Try: one image and what a model makes of it."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from convlens.explore.jobs import Job
from convlens.explore.web import RequestBody, answer, compute, read_body, read_json, workspace_of
from convlens.explore.workspace import Workspace

MAX_FILE_BYTES = 32 << 20
MAX_NAME = 200  # characters of a file name that are kept


def try_routes() -> list[Route]:
    return [
        Route("/api/try/images", add_image, methods=["POST"]),
        Route("/api/try/predict", predict_image, methods=["POST"]),
    ]


async def add_image(request: Request) -> JSONResponse:
    """Keep an image file, which is the body; answer with its id."""
    workspace = workspace_of(request)
    content = await read_body(request, MAX_FILE_BYTES)
    name = request.query_params.get("name", "image")[:MAX_NAME]
    image = workspace.add_image(name, content)
    return answer({"image": image.id, "name": image.name})


class PredictBody(RequestBody):
    run: str
    image: str


async def predict_image(request: Request) -> JSONResponse:
    body = await read_json(request, PredictBody)
    workspace = workspace_of(request)
    return await compute(request, lambda job: _predict(workspace, body, job))


def _predict(workspace: Workspace, body: PredictBody, job: Job) -> dict[str, Any]:
    opened = workspace.open(body.run)
    (prediction,) = opened.predictor.predict([workspace.image(body.image).content], top_k=5)
    return {"top": prediction.top, "error": prediction.error}
