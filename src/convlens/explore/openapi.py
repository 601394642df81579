"""The OpenAPI description of `convlens serve`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from convlens.version import __version__

Schema = dict[str, Any]

NUMBER: Schema = {"type": "number"}
CLASS: Schema = {
    "type": "object",
    "required": ["label", "prob"],
    "properties": {"label": {"type": "string"}, "prob": NUMBER},
}
PREDICTION: Schema = {
    "type": "object",
    "required": ["filename"],
    "description": "The most probable class of an image, or `error` if it could not be read.",
    "properties": {
        "filename": {"type": "string", "description": "Name of the uploaded file; - for a body."},
        "label": {"type": ["string", "null"], "description": "null if the model is unsure"},
        "prob": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
        "top": {"type": "array", "items": {"$ref": "#/components/schemas/Class"}},
        "unsure": {"type": "boolean"},
        "unlike": {"type": ["boolean", "null"], "description": "unlike the training images"},
        "unlike_score": {"type": ["number", "null"]},
        "prediction_set": {"type": "array", "items": {"type": "string"}},
        "error": {"type": "string"},
    },
}
ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string"}, "fix": {"type": "string"}},
}
ERRORS = {
    400: "A multipart body that is damaged, or without an image.",
    401: "The token is missing or wrong.",
    403: "A request of another web page.",
    408: "The body took too long to arrive.",
    413: "The body is too large, or has too many images.",
    415: "The body is not an image that can be read.",
    421: "An unknown host name.",
    503: "Too much work: try again after `Retry-After` seconds.",
}


def describe_service(
    run: str, classes: Sequence[str], *, needs_token: bool, max_images: int
) -> Schema:
    """Return the OpenAPI 3.1 description of a server.

    Args:
        run: name of the run or model.
        classes: of the model.
        needs_token: whether requests need a bearer token.
        max_images: in one request.
    """
    answers: dict[str, Any] = {str(code): _error(text) for code, text in ERRORS.items()}
    image = {"type": "string", "contentMediaType": "application/octet-stream"}
    files = {"type": "array", "items": image, "maxItems": max_images}
    predict: Schema = {
        "operationId": "predict",
        "summary": "Classify one image, or several.",
        "requestBody": {
            "required": True,
            "content": {
                "image/*": {"schema": {}},
                "application/octet-stream": {"schema": {}},
                "multipart/form-data": {
                    "schema": {"type": "object", "properties": {"images": files}},
                },
            },
        },
        "responses": {
            "200": {
                "description": "One prediction for each image, in their order.",
                "content": _json({"$ref": "#/components/schemas/Predictions"}),
            },
            **answers,
        },
    }
    health: Schema = {
        "operationId": "health",
        "summary": "Answers as long as the server works; needs no token.",
        "security": [],
        "responses": {
            "200": {
                "description": "The server works.",
                "content": _json({"type": "object", "properties": {"status": {"const": "ok"}}}),
            }
        },
    }
    predictions = {"type": "array", "items": {"$ref": "#/components/schemas/Prediction"}}
    components: Schema = {
        "schemas": {
            "Class": CLASS,
            "Prediction": PREDICTION,
            "Predictions": {
                "type": "object",
                "required": ["predictions"],
                "properties": {"predictions": predictions},
            },
            "Error": ERROR,
        }
    }
    description: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": f"convlens serve {run}",
            "version": __version__,
            "description": f"Classifies images as one of {len(classes):,} classes.",
        },
        "paths": {"/predict": {"post": predict}, "/healthz": {"get": health}},
        "components": components,
    }
    if needs_token:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        description["security"] = [{"token": []}]
    return description


def _error(text: str) -> Schema:
    return {"description": text, "content": _json({"$ref": "#/components/schemas/Error"})}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}
