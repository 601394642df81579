"""Routes of the part Judge: how well a run classifies a split, and which images it gets wrong.

All figures are the sections of the report, rendered from the predictions that an evaluation keeps
in the run. If there are none, the split is evaluated once. The test split is shown only after the
page has asked, and this is logged as one use of it (`OpenedRun.open_test_split`).

The images of a split have a gallery id that the server hands out; an image is its number there.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from convlens.errors import UsageError
from convlens.explore import web
from convlens.explore.jobs import Job, WorkQueue, result_of
from convlens.explore.web import RequestBody, answer, read_json, workspace_of
from convlens.explore.workspace import OpenedRun, Workspace

if TYPE_CHECKING:
    import numpy as np

    from convlens.reports.contents import ReportContents
    from convlens.reports.html import PageSection

MAX_GALLERIES = 8  # the oldest are dropped
MAX_LISTED = 50_000  # images of a gallery that are listed
PICTURE_SIDE = 512  # pixels of an enlarged image
IMAGES_AT_ONCE = 8  # that are encoded; more than a browser requests at the same time
KEEP_SECONDS = 600  # that the browser keeps a thumbnail, so that scrolling back is free
TOP_CLASSES = 5
# Sections of the report, by their ids there. The worst mistakes are in the gallery.
REPORT_SECTIONS = ("classes", "calibration", "trust", "curves", "data", "recipe", "environment")
INSIDE = ("activations", "attributions", "stages")  # take some seconds: only on request

SplitName = Literal["val", "test"]


def judge_routes() -> list[Route]:
    posts = {
        "figures": show_figures,
        "section": show_section,
        "compare": compare_runs,
        "load": load_images,
        "list": list_images,
        "image": describe_image,
        "open-test": open_test_split,
    }
    return [
        *(Route(f"/api/judge/{name}", view, methods=["POST"]) for name, view in posts.items()),
        Route("/api/judge/thumbnails/{gallery}/{number:int}", send_thumbnail, methods=["GET"]),
        Route("/api/judge/pictures/{gallery}/{number:int}", send_picture, methods=["GET"]),
    ]


@dataclass(frozen=True)
class Gallery:
    """The images of a split of a run, and how the run classifies them.

    Attributes:
        targets, preds: int64 `[N]`, in the order of the split.
        confidence, target_prob: the probabilities of the predicted and of the true class, `[N]`.
    """

    id: str
    opened: OpenedRun
    split: SplitName
    contents: ReportContents
    targets: np.ndarray
    preds: np.ndarray
    confidence: np.ndarray
    target_prob: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)


class Galleries:
    """The galleries that the server has handed out."""

    def __init__(self) -> None:
        self._by_id: OrderedDict[str, Gallery] = OrderedDict()
        self.encoding = asyncio.Semaphore(IMAGES_AT_ONCE)

    def of(self, opened: OpenedRun, contents: ReportContents) -> Gallery:
        """Return the gallery of a split, a new one if it has none."""
        for gallery in list(self._by_id.values()):
            if gallery.contents is contents:
                return gallery
        gallery = make_gallery(opened, contents)
        self._by_id[gallery.id] = gallery
        while len(self._by_id) > MAX_GALLERIES:
            self._by_id.popitem(last=False)
        return gallery

    def find(self, gallery_id: str) -> Gallery:
        """Return a gallery by its id.

        Raises:
            UsageError: the server has not handed it out, or has dropped it since.
        """
        gallery = self._by_id.get(gallery_id)
        if gallery is None:
            raise UsageError("the server has no such images", fix="reload the page")
        return gallery


def make_gallery(opened: OpenedRun, contents: ReportContents) -> Gallery:
    """Return the gallery of a split whose predictions are known."""
    import numpy as np

    assert contents.predictions is not None
    probs, targets = contents.predictions.probs, contents.predictions.labels
    split: SplitName = "test" if contents.split == "test" else "val"
    return Gallery(
        secrets.token_urlsafe(9),
        opened,
        split,
        contents,
        targets,
        probs.argmax(axis=1),
        probs.max(axis=1),
        probs[np.arange(len(targets)), targets],
    )


def _galleries(request: Request) -> Galleries:
    return web.part_state(request, "galleries", Galleries)


# -- figures ----------------------------------------------------------------------------------


class JudgedRunBody(RequestBody):
    run: str


class JudgedSplitBody(JudgedRunBody):
    split: SplitName


async def show_figures(request: Request) -> JSONResponse:
    """Answer with the job that renders the sections about a split of a run."""
    body = await read_json(request, JudgedSplitBody)
    opened = await web.open_run(request, body.run)
    opened.check_is_open(body.split)
    workspace, galleries = workspace_of(request), _galleries(request)

    def render(job: Job) -> dict[str, Any]:
        contents = _contents(opened, body.split)
        gallery = galleries.of(opened, contents) if contents.predictions is not None else None
        return {
            "run": opened.id,
            "split": body.split,
            "gallery": gallery and gallery.id,
            "classes": list(contents.classes),
            "images": 0 if gallery is None else len(gallery),
            "sections": _render(_report_sections(), contents),
            "missing": contents.missing,
            "validation_chose_epoch": contents.validation_chose_epoch,
            "inside": _inside_titles() if gallery else [],
            "test_is_open": opened.test_is_open,
            "test_uses": opened.test_uses(),
        }

    queue = await _queue(workspace, [opened], body.split)
    job = web.start(queue, render, f"judge-{opened.id}-{body.split}", f"evaluating {opened.id}")
    return answer({"job": job.id})


async def _queue(workspace: Workspace, runs: Sequence[OpenedRun], split: SplitName) -> WorkQueue:
    """Return the queue for work on predictions: they are read if cached, else computed."""

    def is_cached(opened: OpenedRun) -> bool:
        return _key(split) in opened.results or _has_predictions(opened, split)

    cached = await asyncio.to_thread(lambda: all(map(is_cached, runs)))
    return workspace.jobs.data if cached else workspace.jobs.long


def _key(split: SplitName) -> str:
    return f"judged-{split}"


def _has_predictions(opened: OpenedRun, split: SplitName) -> bool:
    from convlens import evaluation

    subject = opened.subject
    if subject.run_dir is None:
        return False
    metadata = subject.loaded.model_metadata
    found = evaluation.load_predictions(
        subject.run_dir, split, metadata["data"]["fingerprint"], metadata["sha256"]
    )
    return found is not None


def _contents(opened: OpenedRun, split: SplitName) -> ReportContents:
    """Return what the sections draw from, computed once for each model.

    Raises:
        UsageError: the network is not a run.
    """
    from convlens.reports.contents import gather_split

    key = _key(split)
    if key in opened.results:
        kept: ReportContents = opened.results[key]
        return kept
    # Not the network of quick work: this may run in another thread.
    subject = opened.subject_for_long_work
    if subject.run_dir is None:
        raise UsageError(
            f"{subject.name} is not a convlens run and has no images of its own",
            fix="choose a run",
        )
    own_data = None if _has_predictions(opened, split) else opened.data()
    contents = gather_split(
        subject.run_dir, subject.loaded, split, device=subject.plan.device, own_data=own_data
    )
    if contents.predictions is not None:
        opened.results[key] = contents
    return contents


def _report_sections() -> dict[str, PageSection]:
    from convlens.reports import sections

    return {
        "summary": ("Result", sections.summary_section),
        "confusion": ("Confusion", sections.confusion_buttons),
        **{name: sections.SECTIONS[name] for name in REPORT_SECTIONS},
        "trust": (sections.SECTIONS["trust"][0], sections.trust_text),
    }


def _render(sections: dict[str, PageSection], contents: object) -> list[dict[str, str]]:
    """Return the sections that have something to show, as HTML."""
    shown = []
    for name, (title, render) in sections.items():
        html = render(contents)
        if html is not None:
            shown.append({"id": name, "title": title, "html": str(html)})
    return shown


def _inside_titles() -> list[dict[str, str]]:
    from convlens.reports import sections

    return [{"id": name, "title": sections.INSIDE_SECTIONS[name][0]} for name in INSIDE]


class SectionBody(RequestBody):
    gallery: str
    section: Literal["activations", "attributions", "stages"]


async def show_section(request: Request) -> JSONResponse:
    """Answer with the job that looks inside the network: a section of figures of the report."""
    body = await read_json(request, SectionBody)
    gallery = _galleries(request).find(body.gallery)

    def render(job: Job) -> dict[str, Any]:
        from convlens.reports.sections import inside_section

        images = gallery.opened.split(gallery.split)
        contents = replace(gallery.contents, images=images, missing=[])
        html = inside_section(body.section)(contents)
        return {"html": "" if html is None else str(html), "missing": contents.missing}

    key = f"judge-{body.section}-{gallery.id}"
    job = web.start(workspace_of(request).jobs.long, render, key, body.section)
    return answer({"job": job.id})


class CompareBody(RequestBody):
    """Attributes:
    runs: the first is the reference.
    """

    runs: list[str] = Field(min_length=2, max_length=2)
    split: SplitName


async def compare_runs(request: Request) -> JSONResponse:
    """Answer with the job that compares two runs on the same images, by the paired test."""
    body = await read_json(request, CompareBody)
    runs = [await web.open_run(request, run) for run in body.runs]
    for opened in runs:
        opened.check_is_open(body.split)

    def render(job: Job) -> dict[str, Any]:
        from convlens.reports import compare

        compared = compare.gather_runs([_contents(opened, body.split) for opened in runs])
        missing = [f"{each.name}: {line}" for each in compared.runs for line in each.missing]
        return {
            "verdict": compared.verdict,
            "sections": _render(compare.COMPARE_SECTIONS, compared),
            "missing": missing,
        }

    queue = await _queue(workspace_of(request), runs, body.split)
    key = "judge-compare-" + "-".join([*body.runs, body.split])
    return answer({"job": web.start(queue, render, key, "comparing the runs").id})


async def open_test_split(request: Request) -> JSONResponse:
    """Open the sealed test split of a run after the page has asked; the use is logged."""
    body = await read_json(request, JudgedRunBody)
    return await web.open_test_split(request, await web.open_run(request, body.run))


# -- images -----------------------------------------------------------------------------------


class GalleryBody(RequestBody):
    gallery: str


async def load_images(request: Request) -> JSONResponse:
    """Answer with the job that loads the images of a gallery, which may have to be decoded."""
    body = await read_json(request, GalleryBody)
    gallery = _galleries(request).find(body.gallery)

    def load(job: Job) -> dict[str, Any]:
        return {"images": len(gallery.opened.split(gallery.split))}

    key = f"judge-load-{gallery.id}"
    job = web.start(workspace_of(request).jobs.data, load, key, "reading the images")
    return answer({"job": job.id})


class ListBody(GalleryBody):
    """Which images are listed, and in which order.

    Attributes:
        target, pred: only images of this true or predicted class, by its number.
        only: all images, or those that are classified wrongly or correctly.
        order: by the probability of the true class (`worst`), by that of the predicted class
            (`unsure`), both from the lowest, or by their number in the split.
    """

    target: int | None = Field(None, ge=0)
    pred: int | None = Field(None, ge=0)
    only: Literal["all", "wrong", "right"] = "all"
    order: Literal["worst", "unsure", "number"] = "number"


async def list_images(request: Request) -> JSONResponse:
    """Answer with the numbers, classes and confidences of the images that were asked for."""
    body = await read_json(request, ListBody)
    gallery = _galleries(request).find(body.gallery)
    return answer(await asyncio.to_thread(_list_images, gallery, body))


def _list_images(gallery: Gallery, body: ListBody) -> dict[str, Any]:
    import numpy as np

    wanted = np.ones(len(gallery), bool)
    if body.target is not None:
        wanted &= gallery.targets == body.target
    if body.pred is not None:
        wanted &= gallery.preds == body.pred
    if body.only != "all":
        wanted &= (gallery.targets == gallery.preds) == (body.only == "right")
    numbers = np.flatnonzero(wanted)
    if body.order != "number":
        values = gallery.target_prob if body.order == "worst" else gallery.confidence
        numbers = numbers[np.argsort(values[numbers], kind="stable")]
    shown = numbers[:MAX_LISTED]
    return {
        "total": len(numbers),
        "numbers": shown.tolist(),
        "targets": gallery.targets[shown].tolist(),
        "preds": gallery.preds[shown].tolist(),
        "confidence": np.round(gallery.confidence[shown], 4).tolist(),
    }


class NumberBody(GalleryBody):
    number: int = Field(ge=0)


async def describe_image(request: Request) -> JSONResponse:
    """Answer with the name of an image and its most probable classes."""
    body = await read_json(request, NumberBody)
    gallery = _find_image(request, body.gallery, body.number)

    def describe(job: Job) -> dict[str, Any]:
        from convlens import metrics

        predictions, classes = gallery.contents.predictions, gallery.contents.classes
        assert predictions is not None
        logits = predictions.logits[body.number : body.number + 1]
        probs = metrics.softmax(logits, predictions.temperature)[0]
        best = (-probs).argsort(kind="stable")[:TOP_CLASSES].tolist()
        return {
            "name": str(gallery.opened.split(gallery.split).ids[body.number]),
            "label": classes[gallery.targets[body.number]],
            "top": [{"label": classes[i], "prob": float(probs[i])} for i in best],
            "run": gallery.opened.id,
            "split": gallery.split,
        }

    return answer(await result_of(workspace_of(request).jobs.data.submit(describe)))


def _find_image(request: Request, gallery_id: str, number: int) -> Gallery:
    """Return the gallery of an image.

    Raises:
        UsageError: the server has handed out no such image.
    """
    gallery = _galleries(request).find(gallery_id)
    if number >= len(gallery):
        raise UsageError("the server has no such image", fix="reload the page")
    return gallery


async def send_thumbnail(request: Request) -> Response:
    return await _send_image(request, None)


async def send_picture(request: Request) -> Response:
    return await _send_image(request, PICTURE_SIDE)


async def _send_image(request: Request, side: int | None) -> Response:
    """Answer with an image of a gallery as a file.

    Args:
        side: its largest side in pixels; by default that of a thumbnail.
    """
    number = request.path_params["number"]
    try:
        gallery = _find_image(request, request.path_params["gallery"], number)
    except UsageError as error:
        raise HTTPException(404, error.what) from None

    def encode(job: Job) -> tuple[bytes, str]:
        import torch

        from convlens.reports import html

        rows = gallery.opened.split(gallery.split).rows
        pixels = rows.gather(torch.tensor([number]))[0].cpu().numpy()
        return html.encode_image(pixels) if side is None else html.encode_image(pixels, side)

    # Others wait here: the queue is short, and would refuse them. Fast scrolling requests many
    # images that are out of view again by now.
    async with _galleries(request).encoding:
        if await request.is_disconnected():
            return Response(status_code=204)
        content, media_type = await result_of(workspace_of(request).jobs.data.submit(encode))
    headers = {"cache-control": f"private, max-age={KEEP_SECONDS}"}
    return Response(content, media_type=media_type, headers=headers)
