"""The description of the service is valid OpenAPI 3.1 and fits the answers."""

from __future__ import annotations

from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from convlens.explore import openapi
from convlens.prediction import Prediction, PredictionColumns


@pytest.mark.parametrize("needs_token", [False, True])
def test_description_is_valid(needs_token: bool) -> None:
    description = openapi.describe_service(
        "run", ["a", "b"], needs_token=needs_token, max_images=64
    )
    validate(description)
    assert ("security" in description) == needs_token
    assert description["paths"]["/healthz"]["get"]["security"] == []


def answer_schema() -> dict[str, Any]:
    description = openapi.describe_service("run", ["a", "b"], needs_token=False, max_images=64)
    return {"$ref": "#/components/schemas/Predictions", "components": description["components"]}


def test_answers_fit_the_description() -> None:
    top = (("a", 0.75), ("b", 0.25))
    columns = PredictionColumns(2, unsure=True, sets=True, unlike=True)
    predictions = [
        Prediction("a.png", top, prediction_set=("a",), unlike=False, unlike_score=-1.0),
        Prediction("b.png", top, unsure=True, prediction_set=("a", "b")),
        Prediction("c.png", error="it is empty (0 bytes)"),
    ]
    answer = {"predictions": list(map(columns.to_dict, predictions))}
    known = set(openapi.PREDICTION["properties"])
    assert all(set(entry) <= known for entry in answer["predictions"])
    validator = Draft202012Validator(answer_schema())
    validator.validate(answer)
    assert not validator.is_valid({"predictions": [{"filename": "a", "prob": 2}]})
    assert not validator.is_valid({})
