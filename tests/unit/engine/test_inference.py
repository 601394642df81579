"""Inference: eval mode, float32, and results that do not depend on the batch size."""

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
from convlens.engine.inference import (
    Forward,
    batch_logits,
    probabilities,
    split_logits,
    validation_metrics,
)
from convlens.errors import ResourceError
from convlens.models.cnn import CNN
from helpers.support import PLAN, Memory, Split, Streamed, pictures

NORMALIZE = Normalize([0.5], [0.25])


def trained() -> CNN:
    """A network with updated norm statistics, so that train and eval mode differ."""
    torch.manual_seed(2)
    model = CNN(3, 1, 8, widths=[4, 6], dropout=0.5).train()
    for _ in range(3):
        model(torch.randn(16, 1, 8, 8) * 3 + 1)
    return model


@pytest.mark.parametrize("mode", [True, False])
def test_inference_is_in_eval_mode_and_restores_the_mode(mode: bool) -> None:
    model = trained().train(mode)
    images = pictures(10)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    logits = batch_logits(model, images, NORMALIZE, PLAN)
    assert model.training is mode
    assert all(module.training is mode for module in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    expected = trained().eval()((images.float() / 255 - 0.5) / 0.25)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert torch.equal(logits, batch_logits(model, images, NORMALIZE, PLAN))


def test_the_mode_is_restored_after_an_error() -> None:
    model = trained()
    with pytest.raises(RuntimeError):
        batch_logits(model, torch.zeros(2, 3, 8, 8, dtype=torch.uint8), NORMALIZE, PLAN)
    assert model.training


def test_logits_do_not_depend_on_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model, split = trained(), Split(Memory(pictures(50)), torch.arange(50) % 3)
    expected, labels = split_logits(model, split, NORMALIZE, PLAN)
    assert expected.shape == (50, 3)
    assert torch.equal(labels, split.labels)
    for size in (1, 7, 50):
        monkeypatch.setattr(inference, "MAX_BATCH", size)
        found, _ = split_logits(model, split, NORMALIZE, PLAN)
        assert torch.allclose(found, expected, atol=1e-5)
        assert torch.equal(found.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("count", [1, 255, 256, 257, 512, 513])
def test_every_image_counts_once_and_in_order(count: int) -> None:
    images = pictures(count)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False))
    with torch.no_grad():
        model[1].weight.zero_()[:, 0] = torch.tensor([255.0, -255.0])
    counts: list[int] = []
    for rows in (Memory(images), Streamed(images)):
        split = Split(rows, torch.zeros(count, dtype=torch.int64))
        logits, _ = split_logits(model, split, Normalize([0.0], [1.0]), PLAN, advance=counts.append)
        assert logits[:, 0].round().tolist() == [n % 256 for n in range(count)]
    assert sum(counts) == 2 * count


def test_validation_metrics_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [0.0, math.log(4)]])
    found = validation_metrics(logits, torch.tensor([0, 1, 1]))
    expected = -(math.log(1 / 2) + math.log(1 / 4) + math.log(4 / 5)) / 3
    assert found["val_loss"] == pytest.approx(expected, rel=1e-6)
    assert found["val_accuracy"] == pytest.approx(2 / 3)
    # Predicted 0, 0, 1 for 0, 1, 1: recalls 1 and 1/2, F1 2/3 and 2/3.
    assert found["val_balanced_accuracy"] == pytest.approx(3 / 4)
    assert found["val_macro_f1"] == pytest.approx(2 / 3)


def test_probabilities_are_float64_and_add_up_to_one_for_huge_logits() -> None:
    found = probabilities(torch.tensor([[0.0, math.log(3)], [1e30, -1e30], [3e38, 3e38]]))
    assert found.dtype == np.float64
    assert found.tolist() == [pytest.approx([0.25, 0.75]), [1.0, 0.0], [0.5, 0.5]]


class FirstPixel(nn.Module):
    """Returns the first pixel of each image; `seen` has memory format and size of each batch.

    Args:
        max_images: larger batches run out of memory.
        seconds: time per image in each memory format.
    """

    def __init__(self, max_images: int = 10**6, **seconds: float) -> None:
        super().__init__()
        # Has the memory format of the network: in channels_last, channels are neighbors.
        self.weights = nn.Conv2d(2, 2, 2)
        self.max_images, self.seconds = max_images, seconds
        self.seen: list[tuple[str, int]] = []
        self.now = 0.0

    def perf_counter(self) -> float:
        """A clock that depends on the work of this network only, not on the load of the machine."""
        return self.now

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > self.max_images:
            raise torch.OutOfMemoryError("CUDA out of memory")
        name = "channels_last" if self.weights.weight.stride(1) == 1 else "contiguous"
        assert images.is_contiguous(memory_format=MEMORY_FORMATS[name])
        self.seen.append((name, len(images)))
        self.now += self.seconds.get(name, 0) * len(images)
        return images.flatten(1)[:, :1].contiguous()


def numbered(count: int) -> Split:
    """Images of two channels whose first pixel is their index."""
    return Split(Memory(pictures(count, channels=2)), torch.zeros(count, dtype=torch.int64))


IDENTITY = Normalize([0.0, 0.0], [1.0, 1.0])


@pytest.mark.parametrize("faster", ["contiguous", "channels_last"])
def test_the_faster_memory_format_is_used_and_no_image_is_computed_twice(
    faster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slower = next(name for name in MEMORY_FORMATS if name != faster)
    model = FirstPixel(**{faster: 1e-4, slower: 1.5e-4})
    monkeypatch.setattr(inference, "time", model)
    monkeypatch.setattr(inference, "MAX_BATCH", 1024)
    logits, _ = split_logits(model, numbered(1300), IDENTITY, PLAN, choose_memory_format=True)
    assert (logits[:, 0] * 255).round().tolist() == [n % 256 for n in range(1300)]
    trials = [("channels_last", 20), *[("contiguous", 20), ("channels_last", 20)] * 2]
    others = [(faster, 1024), (faster, 1300 - 16 - 5 * 20 - 1024)]
    assert model.seen == [("contiguous", 16), *trials, *others]


@pytest.mark.parametrize(("gain", "expected"), [(0.04, "contiguous"), (0.06, "channels_last")])
def test_another_format_must_be_at_least_5_percent_faster(
    gain: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FirstPixel(contiguous=1e-3, channels_last=(1 - gain) * 1e-3)
    monkeypatch.setattr(inference, "time", model)
    split_logits(model, numbered(1300), IDENTITY, PLAN, choose_memory_format=True)
    formats = [name for name, _ in model.seen]
    assert formats[:8] == ["contiguous", "channels_last", *["contiguous", "channels_last"] * 3]
    assert set(formats[8:]) == {expected}


@pytest.mark.parametrize("count", [50, 1300])
def test_the_memory_format_stays_if_not_allowed_to_change_or_with_few_images(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FirstPixel(channels_last=0, contiguous=1e-2)
    monkeypatch.setattr(inference, "time", model)
    split_logits(model, numbered(count), IDENTITY, PLAN, choose_memory_format=count == 50)
    assert {name for name, _ in model.seen} == {"contiguous"}


def test_the_batch_size_follows_from_the_largest_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    # Input and output of the flattening have 3 x 64 numbers of 4 bytes each: 1,536 per image.
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Flatten(), nn.Linear(192, 2))
    split = Split(Memory(pictures(200)), torch.zeros(200, dtype=torch.int64))
    expected, _ = split_logits(model, split, NORMALIZE, PLAN)
    for limit, batch in ((1536 * 64, 64), (1536 * 64 - 1, 32), (100, 1)):
        counts: list[int] = []
        monkeypatch.setitem(inference.MAX_ACTIVATION_BYTES, "cpu", limit)
        found, _ = split_logits(model, split, NORMALIZE, PLAN, advance=counts.append)
        assert counts[0] == 16
        assert set(counts[1:-1]) == {batch}
        assert sum(counts) == 200
        assert torch.allclose(found, expected, atol=1e-5)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_measured_batch_size_gives_the_same_batches_and_attaches_no_hooks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Flatten(), nn.Linear(192, 2))
    images = pictures(200)
    for limit, batch in ((1536 * 64, 64), (1536 * 64 - 1, 32), (100, 1)):
        monkeypatch.setitem(inference.MAX_ACTIVATION_BYTES, "cpu", limit)
        expected = list(Forward(model, NORMALIZE, PLAN, total=200).outputs(images))
        size = inference.measure_batch_size(model, images[:1], NORMALIZE, PLAN)
        assert size == batch
        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "register_forward_hook", None)
            forward = Forward(model, NORMALIZE, PLAN, total=200, batch_size=size)
            outputs = list(forward.outputs(images))
        assert [len(each.logits) for each in outputs] == [len(each.logits) for each in expected]
        for each, other in zip(outputs, expected, strict=True):
            assert torch.equal(each.logits, other.logits)


def test_out_of_memory_halves_the_batch_size_with_a_message(
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = FirstPixel(max_images=5)
    logits, _ = split_logits(model, numbered(50), IDENTITY, PLAN)
    assert (logits[:, 0] * 255).round().tolist() == list(range(50))
    assert model.seen == [("contiguous", 4)] * 12 + [("contiguous", 2)]
    messages = capfd.readouterr().err
    assert "out of memory with a batch of 16; continuing with 8" in messages
    assert "out of memory with a batch of 8; continuing with 4" in messages
    with pytest.raises(ResourceError, match="not enough memory"):
        split_logits(FirstPixel(max_images=0), numbered(3), IDENTITY, PLAN)


def test_images_on_disk_are_read_while_the_network_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = Streamed(pictures(100, channels=2))
    monkeypatch.setattr(inference, "CHUNK_BYTES", 128 * 40)  # 40 images of 128 bytes: chunks of 32
    chunks_read: list[int] = []

    class Slow(FirstPixel):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            for _ in range(500):  # another thread reads
                if len(rows.reads) > 1:
                    break
                time.sleep(0.01)
            chunks_read.append(len(rows.reads))
            return super().forward(images)

    logits, _ = split_logits(Slow(), Split(rows, torch.zeros(100)), IDENTITY, PLAN)
    assert (logits[:, 0] * 255).round().tolist() == list(range(100))
    assert [len(chunk) for chunk in rows.reads] == [32, 32, 32, 4]
    assert chunks_read[0] == 2
