"""Images that wait are classified together, and every image gets its own answer."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from convlens.data.input_images import InputImage
from convlens.explore.batching import Batcher, Busy, Room
from convlens.prediction import ImageReader, InputEntry, Prediction, Predictor
from convlens.run import load_model
from helpers.commands import brightness_model
from helpers.serving_models import png


class RecordedPredictor(Predictor):
    """Records the sizes of batches; the first batch waits for `go_on`."""

    def __init__(self, model: Path) -> None:
        super().__init__(load_model(model), "cpu")
        self.sizes: list[int] = []
        self.started, self.go_on = threading.Event(), threading.Event()

    def predict_entries(self, entries: Sequence[InputEntry], **options: Any) -> list[Prediction]:
        self.sizes.append(len(entries))
        self.started.set()
        assert self.go_on.wait(60)
        return super().predict_entries(entries, **options)


@pytest.fixture
def predictor(tmp_path: Path) -> RecordedPredictor:
    return RecordedPredictor(brightness_model(tmp_path / "bright").model_path)


def batcher(predictor: Predictor, **options: Any) -> Batcher:
    conversion = predictor.transform.preprocessing.conversion
    return Batcher(predictor, ImageReader(conversion), **options)


def test_images_that_wait_are_classified_together(predictor: RecordedPredictor) -> None:
    levels = [200 - 10 * n for n in range(20)]
    with batcher(predictor, top_k=2, max_batch=8) as running:
        first = running.submit(InputImage("first", png(255)))
        assert predictor.started.wait(60)  # it waits for no other image
        futures = [running.submit(InputImage(str(n), png(n))) for n in levels]
        running._pool.shutdown()  # all are decoded
        predictor.go_on.set()
        predictions = [each.result(60) for each in (first, *futures)]
    assert predictor.sizes == [1, 8, 8, 4]
    assert [each.filename for each in predictions] == ["first", *map(str, levels)]
    plain = Predictor(predictor._loaded, "cpu")
    for level, prediction in zip([255, *levels], predictions, strict=True):
        (expected,) = plain.predict(png(level), top_k=2)
        assert prediction.label == expected.label
        assert prediction.prob == pytest.approx(expected.prob, abs=1e-6)
        assert len(prediction.top) == 2


def test_all_that_was_submitted_is_answered_before_the_end(predictor: RecordedPredictor) -> None:
    predictor.go_on.set()
    with batcher(predictor) as running:
        futures = [running.submit(InputImage(str(n), png(n))) for n in range(40)]
        futures.append(running.submit(InputImage("text", b"text")))
    assert all(future.done() for future in futures)
    assert futures[-1].result().error == "it is text, not an image"
    assert all(future.result().error is None for future in futures[:-1])


def test_a_request_that_ends_early_does_not_end_the_others(predictor: RecordedPredictor) -> None:
    with batcher(predictor) as running:
        left = running.submit(InputImage("left", png(10)))
        assert predictor.started.wait(60)
        assert not left.cancel()
        predictor.go_on.set()
        assert running.submit(InputImage("next", png(10))).result(60).error is None


def test_an_error_reaches_the_images_of_its_batch_only(
    predictor: RecordedPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor.go_on.set()
    answers = RecordedPredictor.predict_entries

    def fail_on_first(entries: Sequence[InputEntry], **options: Any) -> list[Prediction]:
        if any(entry.name == "bad" for entry in entries):
            raise MemoryError
        return answers(predictor, entries, **options)

    monkeypatch.setattr(predictor, "predict_entries", fail_on_first)
    with batcher(predictor) as running:
        failed: Future[Prediction] = running.submit(InputImage("bad", png(1)))
        with pytest.raises(MemoryError):
            failed.result(60)
        assert running.submit(InputImage("good", png(1))).result(60).label == "dark"


def test_room_is_limited_and_given_back() -> None:
    room = Room(3, "images")
    room.enter(2)
    with pytest.raises(Busy, match="more than 3 images"):
        room.enter(2)
    room.enter(1)
    room.leave(3)
    with room.hold(3), pytest.raises(Busy):
        room.enter(1)
    assert room.used == 0
