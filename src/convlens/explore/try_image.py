"""Routes of the part Try: one image and what a model makes of it.

An image is a file that the page sends, or one of a split. It is kept in the workspace, and every
other request names it by its id. Each answer is about one run; the page asks for two runs in turn.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from convlens.errors import UsageError
from convlens.explore import web
from convlens.explore.jobs import Job, result_of
from convlens.explore.web import RequestBody, answer, compute, read_json, workspace_of
from convlens.explore.workspace import OpenedRun, StoredImage, Workspace

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from convlens.data.dataset import Split
    from convlens.interpret.activations import Maps
    from convlens.interpret.feature_viz import TopImages
    from convlens.interpret.inputs import Picture
    from convlens.uncertainty.calibration import ModelCalibration

MAX_FILE_BYTES = 32 << 20
MAX_NAME = 200  # characters of a file name that are kept
TOP_CLASSES = 5
PROMISES, PROMISE_CONFIDENCE = (0.9, 0.95, 0.99), 0.95
CHANNELS_SHOWN = 24  # of each layer at first
MAX_MAP_SIDE = 64  # pixels of an activation map among others; an enlarged one is complete
NEIGHBORS = 6
MAX_CHOSEN = 48  # images that are offered at once
# Images that are searched, so that a large network takes seconds or a few minutes on a CPU.
MAX_TRAINING_IMAGES = 10_000  # for the nearest ones
MAX_SEARCHED_IMAGES = 1000  # for those that activate a channel most


def try_routes() -> list[Route]:
    posts = {
        "run": describe_run,
        "images": add_image,
        "splits": describe_splits,
        "choose": choose_images,
        "open-test": open_test_split,
        "picture": show_picture,
        "predict": predict_image,
        "heat-map": show_heat_map,
        "activations": show_activations,
        "channel": show_channel,
        "nearest": show_nearest,
        "top-images": show_top_images,
    }
    return [Route(f"/api/try/{name}", view, methods=["POST"]) for name, view in posts.items()]


# -- runs and images --------------------------------------------------------------------------


class RunBody(RequestBody):
    run: str


async def describe_run(request: Request) -> JSONResponse:
    """Answer with what the page needs to know of a model; opens it."""
    body = await read_json(request, RunBody)
    opened = await web.open_run(request, body.run)
    loaded = opened.subject.loaded
    pre = loaded.preprocessing
    return answer(
        {
            "run": opened.id,
            "classes": loaded.classes,
            "size": pre.image_size,
            "channels": pre.channels,
            # Digits of MNIST are light on black, those of a scanner dark on white.
            "dark": sum(pre.mean) / len(pre.mean) < 0.5,
            "mean_color": _mean_color(opened).tolist() * (3 if pre.channels == 1 else 1),
            "calibrated": loaded.calibration.temperature != 1,
            "promises": _possible_promises(loaded.calibration),
            "device": opened.predictor.device,
        }
    )


def _possible_promises(calibration: ModelCalibration) -> list[float]:
    """Return the accuracies that the model can promise for its answers."""
    possible = []
    for accuracy in PROMISES:
        with contextlib.suppress(UsageError):  # too few validation images
            calibration.answer_threshold(accuracy, PROMISE_CONFIDENCE)
            possible.append(accuracy)
    return possible


async def add_image(request: Request) -> JSONResponse:
    """Keep an image file, which is the body; answer with its id."""
    content = await web.read_body(request, MAX_FILE_BYTES)
    if not content:
        raise UsageError("the file is empty", fix="choose another one")
    name = request.query_params.get("name", "image")[:MAX_NAME]
    image = workspace_of(request).add_image(name, content)
    return answer(_describe_image(image))


def _describe_image(image: StoredImage) -> dict[str, Any]:
    return {"image": image.id, "name": image.name, "label": image.label}


async def describe_splits(request: Request) -> JSONResponse:
    """Answer with the splits of a run's data and their sizes; the test split stays sealed."""
    body = await read_json(request, RunBody)
    opened = await web.open_run(request, body.run)
    jobs = workspace_of(request).jobs
    return answer(await result_of(jobs.data.submit(lambda job: _describe_splits(opened))))


def _describe_splits(opened: OpenedRun) -> dict[str, Any]:
    data = opened.data()
    sizes = {"train": len(data.train), "val": len(data.val)}
    return {
        "data": data.name,
        "splits": {name: size for name, size in sizes.items() if size},
        "test_is_open": opened.test_is_open,
        "test_uses": opened.test_uses(),
    }


async def open_test_split(request: Request) -> JSONResponse:
    """Open the sealed test split of a run after the page has asked; the use is logged."""
    body = await read_json(request, RunBody)
    return await web.open_test_split(request, await web.open_run(request, body.run))


class ChooseBody(RequestBody):
    run: str
    split: Literal["train", "val", "test"]
    how: Literal["random", "worst", "class", "number"]
    label: str = ""
    number: int = Field(0, ge=0)
    seed: int = Field(0, ge=0, lt=1 << 31)
    count: int = Field(24, ge=1, le=MAX_CHOSEN)


async def choose_images(request: Request) -> JSONResponse:
    """Answer with some images of a split, each with a new id.

    The worst mistakes need the predictions of the whole split; then the answer is a job.
    """
    body = await read_json(request, ChooseBody)
    workspace = workspace_of(request)
    opened = await web.open_run(request, body.run)

    def choose(job: Job) -> dict[str, Any]:
        return {"images": _choose_images(workspace, opened, body)}

    if body.how == "worst":
        job = workspace.jobs.long.submit(choose, f"choose-{opened.id}", "finding mistakes")
        return answer({"job": job.id})
    return answer(await result_of(workspace.jobs.data.submit(choose)))


def _choose_images(
    workspace: Workspace, opened: OpenedRun, body: ChooseBody
) -> list[dict[str, Any]]:
    import torch

    from convlens.errors import lookup

    split = opened.split(body.split)
    if body.how == "number" and body.number >= len(split):
        raise UsageError(
            f"{body.split}:{body.number} does not exist",
            fix=f"the split has images 0 to {len(split) - 1:,}",
        )
    generator = torch.Generator().manual_seed(body.seed)
    if body.how == "number":
        index = torch.tensor([body.number])
    elif body.how == "worst":
        index = _worst_mistakes(opened, split, body.split)
    elif body.how == "class":
        target = lookup(
            {name: n for n, name in enumerate(opened.subject.classes)}, body.label, "class"
        )
        members = (split.labels == target).nonzero()[:, 0]
        index = members[torch.randperm(len(members), generator=generator)]
    else:
        index = torch.randperm(len(split), generator=generator)
    return _split_images(workspace, opened, split, body.split, index[: body.count].tolist())


def _worst_mistakes(opened: OpenedRun, split: Split, name: str) -> Tensor:
    """Return the numbers of the misclassified images, the worst first; they are kept."""
    import torch

    from convlens import evaluation, run_plots
    from convlens.interpret import inputs

    key = f"worst-{name}"
    if key not in opened.results:
        subject = opened.subject
        metadata = subject.loaded.model_metadata
        cached = subject.run_dir and evaluation.load_predictions(
            subject.run_dir, name, metadata["data"]["fingerprint"], metadata["sha256"]
        )
        if cached:
            worst = run_plots.worst_mistake_images(cached.probs, cached.labels)
            opened.results[key] = torch.from_numpy(worst)
        else:
            opened.results[key] = inputs.worst_images(opened.subject_for_long_work, split)
    worst_images: Tensor = opened.results[key]
    return worst_images


def _keep_picture(workspace: Workspace, opened: OpenedRun, picture: Picture) -> StoredImage:
    """Keep an image of a split of a run."""
    label = None if picture.label is None else opened.subject.classes[picture.label]
    return workspace.add_image(
        picture.name, picture.pixels, run=opened.id, label=label, image_id=picture.id
    )


def _picture_for(workspace: Workspace, opened: OpenedRun, image_id: str) -> Picture:
    """Return an image as the network of a run sees it; only quick jobs may call this.

    Raises:
        UsageError: an unknown id.
        DataError: the file cannot be read.
    """
    from convlens.interpret import inputs

    image = workspace.image(image_id)
    subject = opened.subject
    if isinstance(image.content, bytes):
        return inputs.read_picture(subject, image.content, image.name)
    source = workspace.open(image.run).subject
    label = None if image.label is None else source.classes.index(image.label)
    picture = inputs.Picture(image.name, image.content, label, image.image_id)
    return inputs.convert_picture(picture, source, subject)


# -- one image --------------------------------------------------------------------------------


class ImageBody(RequestBody):
    """A run and an image.

    Attributes:
        page: a name that the page has chosen; its newest request of a kind replaces older ones.
    """

    run: str
    image: str
    page: str = Field("", max_length=40)

    def key(self, kind: str) -> str:
        return f"{kind}-{self.page}-{self.run}" if self.page else ""


Asked = TypeVar("Asked", bound=ImageBody)


async def _answer_about_image(
    request: Request,
    model: type[Asked],
    kind: str,
    function: Callable[[Workspace, Asked], dict[str, Any]],
) -> JSONResponse:
    """Answer with the result of a function of the body; newer requests of a kind replace it."""
    body = await read_json(request, model)
    workspace = workspace_of(request)
    return await compute(request, lambda job: function(workspace, body), body.key(kind))


async def show_picture(request: Request) -> JSONResponse:
    """Answer with the pixels that the network sees."""
    return await _answer_about_image(request, ImageBody, "picture", _show_picture)


def _show_picture(workspace: Workspace, body: ImageBody) -> dict[str, Any]:
    opened = workspace.open(body.run)
    picture = _picture_for(workspace, opened, body.image)
    channels, height, width = picture.pixels.shape
    truth = None if picture.label is None else opened.subject.classes[picture.label]
    return {
        "channels": channels,
        "height": height,
        "width": width,
        "pixels": _encode(picture.pixels.permute(1, 2, 0).contiguous().numpy()),
        "label": truth or workspace.image(body.image).label,
        "id": picture.id,
    }


class PredictBody(ImageBody):
    """An image, parts of which may be hidden.

    Attributes:
        hidden: one bit for each pixel that the network sees, row by row, in base64.
        min_accuracy: answer only where this accuracy is promised.
    """

    hidden: str = Field("", max_length=1 << 19)
    min_accuracy: float | None = Field(None, gt=0, lt=1)


async def predict_image(request: Request) -> JSONResponse:
    """Answer with the most probable classes, and whether the model would answer."""
    return await _answer_about_image(request, PredictBody, "predict", _predict)


def _predict(workspace: Workspace, body: PredictBody) -> dict[str, Any]:
    opened = workspace.open(body.run)
    picture = _picture_for(workspace, opened, body.image)
    pixels = picture.pixels.numpy()
    if body.hidden:
        pixels = _hide(pixels, _decode_mask(body.hidden, pixels.shape[1:]), opened)
    (prediction,) = opened.predictor.predict(
        [pixels],
        top_k=TOP_CLASSES,
        min_accuracy=body.min_accuracy,
        confidence=PROMISE_CONFIDENCE,
        channels="first",
    )
    return {
        "top": [{"label": label, "prob": prob} for label, prob in prediction.top],
        "unsure": prediction.unsure,
        "unlike": prediction.unlike,
    }


def _decode_mask(text: str, shape: Sequence[int]) -> np.ndarray:
    """Return a mask `[S, S]` from its bits in base64.

    Raises:
        UsageError: it is not a mask of that size.
    """
    import numpy as np

    size = math.prod(shape)
    try:
        bits = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    except (binascii.Error, ValueError):
        bits = np.empty(0, np.uint8)
    if len(bits) != -(-size // 8):
        raise UsageError("the mask does not have the size of the image", fix="reload the page")
    return np.unpackbits(bits, count=size).reshape(tuple(shape)).astype(bool)


def _hide(pixels: np.ndarray, mask: np.ndarray, opened: OpenedRun) -> np.ndarray:
    """Return the image with the mean color of the training images where the mask is set."""
    import numpy as np

    hidden: np.ndarray = np.where(mask[None], _mean_color(opened)[:, None, None], pixels)
    return hidden


def _mean_color(opened: OpenedRun) -> np.ndarray:
    """Return the mean color of the training images, uint8 `[C]`.

    Occlusion maps use it, too, since it is 0 after normalization.
    """
    import numpy as np

    mean = np.array(opened.subject.loaded.preprocessing.mean)
    return np.clip(np.round(mean * 255), 0, 255).astype(np.uint8)


class HeatMapBody(ImageBody):
    method: str = "grad-cam"
    target: str = ""  # the class; by default the predicted one


async def show_heat_map(request: Request) -> JSONResponse:
    """Answer with an attribution map, which the page lays over the image."""
    return await _answer_about_image(request, HeatMapBody, "heat-map", _heat_map)


def _heat_map(workspace: Workspace, body: HeatMapBody) -> dict[str, Any]:
    from convlens.interpret import attribution, attribution_methods

    opened = workspace.open(body.run)
    picture = _picture_for(workspace, opened, body.image)
    (model,) = attribution.compute_attributions(
        [opened.subject], [[picture]], [body.method], target=body.target or None, quiet=True
    )
    (values,) = model.maps[body.method].numpy()
    method = attribution_methods.METHODS[body.method]
    target = int(model.targets[0])
    high = float(abs(values).max())
    return {
        "label": model.classes[target],
        "prob": float(model.probs[0, target]),
        "layer": model.layer if method.layered else None,
        "title": method.title,
        "signed": method.signed,
        "max": high,
        **_encode_maps(values[None], (-high if method.signed else 0.0, high)),
    }


class ActivationsBody(ImageBody):
    layer: str = ""  # by default the stem and every block
    channels: int = Field(CHANNELS_SHOWN, ge=1, le=1 << 14)

    def key(self, kind: str) -> str:
        return super().key(f"{kind}{self.layer}")


async def show_activations(request: Request) -> JSONResponse:
    """Answer with the activation maps of each layer, the most active channels first."""
    return await _answer_about_image(request, ActivationsBody, "activations", _activations)


def _activations(workspace: Workspace, body: ActivationsBody) -> dict[str, Any]:
    from convlens.interpret import activations

    opened = workspace.open(body.run)
    picture = _picture_for(workspace, opened, body.image)
    names = [body.layer] if body.layer else []
    (layers,) = activations.check_layers([opened.subject], names)
    activity = activations.compute_activity(opened.subject, picture, layers)
    shown = []
    for statistics in activity.numbers():
        maps = activity.maps[statistics.layer]
        limits = activations.channel_limits([maps])
        order = activations.channel_order(maps, "active")[: body.channels]
        shown.append(
            {
                **asdict(statistics),
                "limits": limits,
                "order": order.tolist(),
                **_encode_maps(_shrink(maps[order]), limits),
            }
        )
    return {"layers": shown}


class ChannelBody(ImageBody):
    layer: str
    channel: int = Field(ge=0)


async def show_channel(request: Request) -> JSONResponse:
    """Answer with one channel of a layer at its full resolution."""
    return await _answer_about_image(request, ChannelBody, "channel", _channel)


def _channel(workspace: Workspace, body: ChannelBody) -> dict[str, Any]:
    from convlens.interpret import activations, features

    opened = workspace.open(body.run)
    picture = _picture_for(workspace, opened, body.image)
    (layer,) = features.find_layers(opened.subject.model, [body.layer])
    maps = activations.compute_activity(opened.subject, picture, [layer]).maps[layer]
    _check_channel(body.channel, layer, len(maps))
    limits = activations.channel_limits([maps])
    one = maps[body.channel]
    return {
        "limits": limits,
        "mean": float(one.mean()),
        "max": float(one.max()),
        **_encode_maps(one[None], limits),
    }


def _check_channel(channel: int, layer: str, count: int) -> None:
    if channel >= count:
        raise UsageError(
            f"{layer} has no channel {channel}", fix=f"it has channels 0 to {count - 1}"
        )


# -- over many images -------------------------------------------------------------------------


async def show_nearest(request: Request) -> JSONResponse:
    """Answer with the nearest of the training images whose features are known by now.

    While these are computed, also with the job; after it has been cancelled, those so far are kept.
    """
    body = await read_json(request, ImageBody)
    workspace = workspace_of(request)
    opened = await web.open_run(request, body.run)
    workspace.image(body.image)  # an unknown one must not start work
    long, key = workspace.jobs.long, f"nearest-{opened.id}"
    job = long.running_or_waiting(key)
    if job is None and "nearest" not in opened.results:
        title = "comparing with training images"
        job = long.submit(lambda job: _index_training_images(opened), key, title)
    found: dict[str, Any] = {"job": job.id if job else None}
    if "nearest" in opened.results:
        nearest = workspace.jobs.quick.submit(
            lambda job: _nearest(workspace, opened, body), body.key("nearest")
        )
        found |= await result_of(nearest)
    return answer(found)


def _index_training_images(opened: OpenedRun) -> None:
    from convlens.interpret import embedding

    def keep(index: embedding.FeatureIndex) -> None:
        opened.results["nearest"] = index

    subject, train = opened.subject_for_long_work, opened.split("train")
    keep(embedding.index_features(subject, train, MAX_TRAINING_IMAGES, on_batch=keep))


def _nearest(workspace: Workspace, opened: OpenedRun, body: ImageBody) -> dict[str, Any]:
    from convlens.interpret import embedding

    index: embedding.FeatureIndex = opened.results["nearest"]
    picture = _picture_for(workspace, opened, body.image)
    found = embedding.nearest_in_index(opened.subject, index, picture, NEIGHBORS)
    numbers = [neighbor.number for neighbor in found]
    images = _split_images(workspace, opened, index.train, "train", numbers)
    for image, neighbor in zip(images, found, strict=True):
        image |= {"distance": neighbor.distance, "same": neighbor.same}
    return {"images": images, "searched": len(index), "of": len(index.train)}


class TopImagesBody(RequestBody):
    run: str
    layer: str
    channel: int = Field(ge=0)


async def show_top_images(request: Request) -> JSONResponse:
    """Answer with the images that activate a channel most, or with the job that finds them."""
    body = await read_json(request, TopImagesBody)
    workspace = workspace_of(request)
    opened = await web.open_run(request, body.run)
    key = f"top-images-{body.layer}"
    if key not in opened.results:

        def find(job: Job) -> None:
            opened.results[key] = _find_top_images(opened, body.layer)

        title = f"images for {body.layer}"
        job = web.start(workspace.jobs.long, find, f"{key}-{opened.id}", title)
        return answer({"job": job.id})
    found = await result_of(
        workspace.jobs.data.submit(lambda job: _top_images(workspace, opened, body, key))
    )
    return answer(found)


def _find_top_images(opened: OpenedRun, layer: str) -> tuple[TopImages, Split, int, str]:
    """Search up to 1,000 validation images (training images if there are none), spread evenly."""
    import torch

    from convlens.data.dataset import Split
    from convlens.interpret import feature_viz

    name = "val" if len(opened.data().val) else "train"
    split = opened.split(name)
    index = torch.linspace(0, len(split) - 1, min(len(split), MAX_SEARCHED_IMAGES)).round().long()
    searched = Split(
        split.rows.subset(index), split.labels[index], [split.ids[i] for i in index.tolist()]
    )
    top = feature_viz.top_activating(opened.subject_for_long_work, searched, layer, name)
    return top, searched, len(split), name


def _top_images(
    workspace: Workspace, opened: OpenedRun, body: TopImagesBody, key: str
) -> dict[str, Any]:
    top, searched, total, name = opened.results[key]
    _check_channel(body.channel, body.layer, len(top.images))
    numbers = top.images[body.channel].tolist()
    images = _split_images(workspace, opened, searched, name, numbers)
    for image, peak in zip(images, top.peaks[body.channel].tolist(), strict=True):
        image["peak"] = peak
    return {"images": images, "searched": len(searched), "of": total, "split": name}


def _split_images(
    workspace: Workspace, opened: OpenedRun, split: Split, name: str, numbers: Sequence[int]
) -> list[dict[str, Any]]:
    """Return images of a split with new ids, labels and thumbnails."""
    import torch

    from convlens.interpret import inputs
    from convlens.reports import html

    index = torch.tensor(list(numbers), dtype=torch.int64)
    shown = []
    for picture in inputs.pictures_at(split, index, name):
        image = _keep_picture(workspace, opened, picture)
        shown.append(_describe_image(image) | {"source": html.thumbnail(picture.pixels.numpy())})
    return shown


# -- arrays -----------------------------------------------------------------------------------


def _shrink(maps: Maps) -> Maps:
    """Return maps `[C, h, w]` whose sides are at most `MAX_MAP_SIDE`, averaged over blocks."""
    block = max(1, -(-max(maps.shape[1:]) // MAX_MAP_SIDE))
    if block == 1:
        return maps
    height, width = (max(1, side // block) for side in maps.shape[1:])
    rows, columns = min(block, maps.shape[1]), min(block, maps.shape[2])
    cropped = maps[:, : height * rows, : width * columns]
    shrunk: Maps = cropped.reshape(len(maps), height, rows, width, columns).mean((2, 4))
    return shrunk


def _encode_maps(maps: Maps, limits: tuple[float, float]) -> dict[str, Any]:
    """Return maps `[C, h, w]` as one byte per value: 0 and 255 are the limits, NaN is 0."""
    import numpy as np

    low, high = limits
    scaled = (maps - low) / ((high - low) or 1.0)
    values = np.clip(np.nan_to_num(scaled, nan=0.0), 0, 1) * 255
    return {
        "map_height": maps.shape[1],
        "map_width": maps.shape[2],
        "maps": _encode(np.round(values).astype(np.uint8)),
    }


def _encode(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")
