"""The forward pass of every number: eval mode, float32, whatever the batch."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from torch import nn

from convlens.data.loader import Normalize
from convlens.device import MEMORY_FORMATS
from convlens.engine import inference
from convlens.engine.inference import batch_logits, loss_and_accuracy, probabilities, split_logits
from convlens.errors import ResourceError
from convlens.models.cnn import CNN
from helpers.support import PLAN, Memory, Split, Streamed, pictures

NORMALISE = Normalize([0.5], [0.25])


def trained() -> CNN:
    """A network whose norms have seen something, so that train and eval mode differ."""
    torch.manual_seed(2)
    model = CNN(3, 1, 8, widths=[4, 6], dropout=0.5).train()
    for _ in range(3):
        model(torch.randn(16, 1, 8, 8) * 3 + 1)
    return model


@pytest.mark.parametrize("mode", [True, False])
def test_inference_is_in_eval_mode_and_leaves_the_mode_as_it_was(mode: bool) -> None:
    model = trained().train(mode)
    images = pictures(10)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    logits = batch_logits(model, images, NORMALISE, PLAN)
    assert model.training is mode
    assert all(module.training is mode for module in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    expected = trained().eval()((images.float() / 255 - 0.5) / 0.25)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert torch.equal(logits, batch_logits(model, images, NORMALISE, PLAN))


def test_the_mode_is_back_after_an_error() -> None:
    model = trained()
    with pytest.raises(RuntimeError):
        batch_logits(model, torch.zeros(2, 3, 8, 8, dtype=torch.uint8), NORMALISE, PLAN)
    assert model.training


def test_logits_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, split = trained(), Split(Memory(pictures(50)), torch.arange(50) % 3)
    whole, labels = split_logits(model, split, NORMALISE, PLAN)
    assert whole.shape == (50, 3)
    assert torch.equal(labels, split.labels)
    for size in (1, 7, 50):
        monkeypatch.setattr(inference, "MAX_BATCH", size)
        found, _ = split_logits(model, split, NORMALISE, PLAN)
        assert torch.allclose(found, whole, atol=1e-5)
        assert torch.equal(found.argmax(1), whole.argmax(1))


@pytest.mark.parametrize("count", [1, 255, 256, 257, 512, 513])
def test_every_image_counts_once_and_in_order(count: int) -> None:
    images = pictures(count)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False))
    with torch.no_grad():
        model[1].weight.zero_()[:, 0] = torch.tensor([255.0, -255.0])
    told: list[int] = []
    for rows in (Memory(images), Streamed(images)):
        split = Split(rows, torch.zeros(count, dtype=torch.int64))
        logits, _ = split_logits(model, split, Normalize([0.0], [1.0]), PLAN, advance=told.append)
        assert logits[:, 0].round().tolist() == [n % 256 for n in range(count)]
    assert sum(told) == 2 * count


def test_loss_and_accuracy_computed_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [0.0, math.log(4)]])
    loss, accuracy = loss_and_accuracy(logits, torch.tensor([0, 1, 1]))
    expected = -(math.log(1 / 2) + math.log(1 / 4) + math.log(4 / 5)) / 3
    assert loss == pytest.approx(expected, rel=1e-6)
    assert accuracy == pytest.approx(2 / 3)


def test_probabilities_are_float64_and_add_up_even_for_huge_logits() -> None:
    found = probabilities(torch.tensor([[0.0, math.log(3)], [1e30, -1e30], [3e38, 3e38]]))
    assert found.dtype == np.float64
    assert found.tolist() == [pytest.approx([0.25, 0.75]), [1.0, 0.0], [0.5, 0.5]]


class Numbers(nn.Module):
    """Gives each image's first pixel. `seen` is the memory format and size of each batch."""

    def __init__(self, most: int = 10**6, **seconds: float) -> None:
        super().__init__()
        # Its layout is the network's: a pixel's channels are neighbours in channels_last.
        self.weights = nn.Conv2d(2, 2, 2)
        self.most, self.seconds = most, seconds
        self.seen: list[tuple[str, int]] = []
        self.now = 0.0

    def perf_counter(self) -> float:
        """A clock that only this network's work moves, so that no neighbour's load counts."""
        return self.now

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > self.most:
            raise torch.OutOfMemoryError("as a GPU says it")
        name = "channels_last" if self.weights.weight.stride(1) == 1 else "contiguous"
        assert images.is_contiguous(memory_format=MEMORY_FORMATS[name])
        self.seen.append((name, len(images)))
        self.now += self.seconds.get(name, 0) * len(images)
        return images.flatten(1)[:, :1].contiguous()


def color(count: int) -> Split:
    """Images of two channels whose first pixel is their number."""
    return Split(Memory(pictures(count, channels=2)), torch.zeros(count, dtype=torch.int64))


PLAIN = Normalize([0.0, 0.0], [1.0, 1.0])


@pytest.mark.parametrize("quicker", ["contiguous", "channels_last"])
def test_the_quicker_memory_format_does_the_rest_and_no_image_is_computed_twice(
    quicker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slower = next(name for name in MEMORY_FORMATS if name != quicker)
    model = Numbers(**{quicker: 1e-4, slower: 1.5e-4})
    monkeypatch.setattr(inference, "time", model)
    monkeypatch.setattr(inference, "MAX_BATCH", 1024)
    logits, _ = split_logits(model, color(1300), PLAIN, PLAN, free=True)
    assert (logits[:, 0] * 255).round().tolist() == [n % 256 for n in range(1300)]
    trials = [("channels_last", 20), *[("contiguous", 20), ("channels_last", 20)] * 2]
    rest = [(quicker, 1024), (quicker, 1300 - 16 - 5 * 20 - 1024)]
    assert model.seen == [("contiguous", 16), *trials, *rest]


@pytest.mark.parametrize(("gain", "taken"), [(0.04, "contiguous"), (0.06, "channels_last")])
def test_a_format_must_gain_a_twentieth(
    gain: float, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Numbers(contiguous=1e-3, channels_last=(1 - gain) * 1e-3)
    monkeypatch.setattr(inference, "time", model)
    split_logits(model, color(1300), PLAIN, PLAN, free=True)
    formats = [name for name, _ in model.seen]
    assert formats[:8] == ["contiguous", "channels_last", *["contiguous", "channels_last"] * 3]
    assert set(formats[8:]) == {taken}


@pytest.mark.parametrize("count", [50, 1300])
def test_without_leave_or_with_few_images_the_memory_format_stays(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Numbers(channels_last=0, contiguous=1e-2)
    monkeypatch.setattr(inference, "time", model)
    split_logits(model, color(count), PLAIN, PLAN, free=count == 50)
    assert {name for name, _ in model.seen} == {"contiguous"}


def test_a_batch_is_as_large_as_the_largest_layer_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    # 3 x 64 numbers of 4 bytes go into the flattening and as many come out: 1,536 an image.
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Flatten(), nn.Linear(192, 2))
    split = Split(Memory(pictures(200)), torch.zeros(200, dtype=torch.int64))
    expected, _ = split_logits(model, split, NORMALISE, PLAN)
    for limit, batch in ((1536 * 64, 64), (1536 * 64 - 1, 32), (100, 1)):
        told: list[int] = []
        monkeypatch.setitem(inference.MAX_ACTIVATION_BYTES, "cpu", limit)
        found, _ = split_logits(model, split, NORMALISE, PLAN, advance=told.append)
        assert told[0] == 16
        assert set(told[1:-1]) == {batch}
        assert sum(told) == 200
        assert torch.allclose(found, expected, atol=1e-5)
    assert not any(module._forward_hooks for module in model.modules())


def test_out_of_memory_halves_the_batch_and_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    model = Numbers(most=5)
    logits, _ = split_logits(model, color(50), PLAIN, PLAN)
    assert (logits[:, 0] * 255).round().tolist() == list(range(50))
    assert model.seen == [("contiguous", 4)] * 12 + [("contiguous", 2)]
    told = capfd.readouterr().err
    assert "out of memory with 16 images at once: going on with 8" in told
    assert "with 8 images at once: going on with 4" in told
    with pytest.raises(ResourceError, match="not enough memory"):
        split_logits(Numbers(most=0), color(3), PLAIN, PLAN)


def test_what_is_not_in_memory_is_read_while_the_network_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = Streamed(pictures(100, channels=2))
    monkeypatch.setattr(inference, "READ", 128 * 40)  # 40 images of 128 bytes: pieces of 32
    asked: list[int] = []

    class Slow(Numbers):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            for _ in range(500):  # the reader is another thread
                if len(rows.asked) > 1:
                    break
                time.sleep(0.01)
            asked.append(len(rows.asked))
            return super().forward(images)

    logits, _ = split_logits(Slow(), Split(rows, torch.zeros(100)), PLAIN, PLAN)
    assert (logits[:, 0] * 255).round().tolist() == list(range(100))
    assert [len(piece) for piece in rows.asked] == [32, 32, 32, 4]
    assert asked[0] == 2
