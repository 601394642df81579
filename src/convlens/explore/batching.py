"""Dynamic batching: images of many requests are classified together.

A pool of threads decodes images. One thread runs the network on all images that are ready, up to a
maximum. While it computes, the next images arrive, so batches grow by themselves under load. It
does not wait for a batch to become full. But clients that have just been answered often send their
next image at once, and without a short pause they would be split for good into groups that take
turns. So after a batch of k images it waits for k more, for a tenth of the time of that batch at
most. A single client never waits.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from convlens.errors import ResourceError

if TYPE_CHECKING:  # these import torch
    from convlens.data.input_images import InputImage
    from convlens.prediction import ImageReader, InputEntry, Prediction, Predictor
    from convlens.uncertainty.promises import Promises

MAX_BATCH = 32  # images that the network classifies at once
# Longest pause before the next batch, as a share of the time of the last one. With a ResNet-18 at
# 224 px and 8 clients a batch of 8 takes 10% less time per image than two batches of 4.
PAUSE_SHARE = 0.1


class Busy(ResourceError):  # noqa: N818
    """Too much work is waiting already."""


class Room:
    """Room for a limited amount of work; what does not fit is refused. For one thread.

    Args:
        total: the amount that fits.
        unit: what is counted, for the error message.
    """

    def __init__(self, total: int, unit: str) -> None:
        self.total, self.unit = total, unit
        self.used = 0

    def enter(self, amount: int) -> None:
        """Use some of the room until `leave`.

        Raises:
            Busy: it does not fit.
        """
        if self.used + amount > self.total:
            raise Busy(
                f"too much work: more than {self.total:,} {self.unit} are waiting",
                fix="try again in a second",
            )
        self.used += amount

    def leave(self, amount: int) -> None:
        self.used -= amount

    @contextlib.contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        """Use some of the room within a block."""
        self.enter(amount)
        try:
            yield
        finally:
            self.leave(amount)


class Batcher:
    """Decodes images in several threads and classifies what is ready in one. A context manager.

    Args:
        predictor: the model, which other threads may use, too.
        reader: decodes the images.
        top_k, promises: as for `Predictor.predict_entries`.
        threads: that decode.
        max_batch: images that are classified at once.
    """

    def __init__(
        self,
        predictor: Predictor,
        reader: ImageReader,
        *,
        top_k: int = 1,
        promises: Promises | None = None,
        threads: int = 2,
        max_batch: int = MAX_BATCH,
    ) -> None:
        self._predictor, self._reader = predictor, reader
        self._top_k, self._promises = top_k, promises
        self._max_batch = max_batch
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._ready: deque[tuple[InputEntry, Future[Prediction]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._worker = threading.Thread(target=self._run, name="classify", daemon=True)

    def __enter__(self) -> Batcher:
        self._worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Classify what has been submitted, and end the threads."""
        self._pool.shutdown()
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._worker.join()

    def submit(self, image: InputImage) -> Future[Prediction]:
        """Return the future prediction for an image, which has an error if it is unreadable."""
        future: Future[Prediction] = Future()
        # It can't be cancelled from now on: a request that ends early would otherwise make
        # `set_result` fail in the thread that classifies.
        future.set_running_or_notify_cancel()
        self._pool.submit(self._decode, image, future)
        return future

    def _decode(self, image: InputImage, future: Future[Prediction]) -> None:
        try:
            (entry,) = self._reader.read_task([image])
        except BaseException as error:
            future.set_exception(error)
            return
        with self._changed:
            self._ready.append((entry, future))
            self._changed.notify()

    def _run(self) -> None:
        pause = 0.0
        batch: list[tuple[InputEntry, Future[Prediction]]] = []
        while batch := self._next_batch(len(batch), pause):
            start = time.perf_counter()
            entries, futures = zip(*batch, strict=True)
            try:
                predictions = self._predictor.predict_entries(
                    entries, top_k=self._top_k, promises=self._promises
                )
            except BaseException as error:
                for future in futures:
                    future.set_exception(error)
            else:
                for future, prediction in zip(futures, predictions, strict=True):
                    future.set_result(prediction)
            pause = PAUSE_SHARE * (time.perf_counter() - start)

    def _next_batch(
        self, expected: int, pause: float
    ) -> list[tuple[InputEntry, Future[Prediction]]]:
        """Wait for images and return them; none after the end.

        Args:
            expected: images that probably follow at once, as many as have just been answered.
            pause: seconds to wait for them.
        """
        with self._changed:
            enough = min(len(self._ready) + expected, self._max_batch)
            self._changed.wait_for(lambda: len(self._ready) >= enough or self._closed, pause)
            self._changed.wait_for(lambda: self._ready or self._closed)
            count = min(len(self._ready), self._max_batch)
            return [self._ready.popleft() for _ in range(count)]
