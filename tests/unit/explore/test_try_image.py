from __future__ import annotations

import io

from PIL import Image

from helpers.exploring import Page


def png(value: int = 100, size: int = 8) -> bytes:
    content = io.BytesIO()
    Image.new("L", (size, size), value).save(content, "PNG")
    return content.getvalue()


def test_uploaded_image_is_classified_as_by_the_library(page: Page) -> None:
    image = page.post("/api/try/images?name=seven.png", content=png())
    assert image["name"] == "seven.png"
    answer = page.post("/api/try/predict", {"run": "small", "image": image["image"]})
    opened = page.workspace.open("small")
    (expected,) = opened.predictor.predict([png()], top_k=5)
    assert [tuple(each) for each in answer["top"]] == list(expected.top)
