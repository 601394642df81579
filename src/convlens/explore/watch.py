"""Routes of the part Watch: the runs, their curves while they train, and stopping one.

Everything is read from the files that a training writes anyway. A file is read again only if it
has changed, and the training does no work for it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from convlens.errors import ConvlensError, UsageError
from convlens.explore.jobs import result_of
from convlens.explore.web import RequestBody, answer, read_json, workspace_of
from convlens.explore.workspace import Workspace
from convlens.utils import process

POLL_SECONDS = 0.25
KEEP_ALIVE_SECONDS = 15.0  # after which a comment is sent, so that a closed connection is noticed
RECENT_EPOCHS = 5  # whose time is used to predict the rest
MAX_RUNS = 7  # whose curves are drawn together
WATCHED_FILES = ("run.json", "metrics.csv", "results.json", "trainer.json")


def watch_routes() -> list[Route]:
    return [
        Route("/api/watch/events", stream_states, methods=["GET"]),
        Route("/api/watch/curves", draw_curves, methods=["POST"]),
        Route("/api/watch/stop", stop_training, methods=["POST"]),
    ]


class RunsBody(RequestBody):
    runs: list[str] = Field(min_length=1, max_length=MAX_RUNS)


class StopBody(RequestBody):
    run: str


async def stream_states(request: Request) -> StreamingResponse:
    """Send the table of runs now and whenever it changes, as server-sent events."""
    states = RunStates(workspace_of(request))
    stopping: threading.Event = request.app.state.stopping
    return StreamingResponse(_events(states, stopping), media_type="text/event-stream")


async def _events(states: RunStates, stopping: threading.Event) -> AsyncIterator[str]:
    quiet = 0.0
    before = None
    while not stopping.is_set():
        current = await asyncio.to_thread(states.read)
        if current != before:
            before, quiet = current, 0.0
            content = answer({"runs": current}).body
            yield f"data: {bytes(content).decode()}\n\n"
        elif quiet >= KEEP_ALIVE_SECONDS:
            quiet = 0.0
            yield ": still here\n\n"
        await asyncio.sleep(POLL_SECONDS)
        quiet += POLL_SECONDS


class RunStates:
    """The table of runs. What was read is kept until the files of a run change."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._known: dict[str, tuple[Any, dict[str, Any]]] = {}

    def read(self) -> list[dict[str, Any]]:
        """Return the state of each run; those that are training come first."""
        rows = [self._row(run, self._workspace.path(run)) for run in self._workspace.run_ids()]
        return sorted(rows, key=lambda row: row["state"] != "training")

    def _row(self, run: str, path: Path) -> dict[str, Any]:
        if path.is_file():  # a model without its run
            return {"run": run, "state": "model file"}
        stamp = [_stamp(path / name) for name in WATCHED_FILES]
        if run not in self._known or self._known[run][0] != stamp:
            self._known[run] = stamp, self._describe(run, path)
        row = dict(self._known[run][1])
        trainer = row.pop("trainer", None)
        if row["state"] != "finished":
            row["state"] = _training_state(trainer)
        return row

    def _describe(self, run: str, path: Path) -> dict[str, Any]:
        from convlens.run import RunDir  # imports torch

        try:
            return describe_run(run, RunDir(path))
        except (ConvlensError, LookupError, ValueError, TypeError, AttributeError) as error:
            what = error.what if isinstance(error, ConvlensError) else "its files are damaged"
            return {"run": run, "state": "damaged", "problem": what}


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _training_state(trainer: Mapping[str, Any] | None) -> str:
    running = process.is_running(trainer) if trainer else False
    if running is None:
        return "on another machine"
    return "training" if running else "interrupted"


def describe_run(run: str, run_dir: Any) -> dict[str, Any]:
    """Return the row of a run: its state, epochs, accuracy with its interval, speed and time left.

    Args:
        run: its id.
        run_dir: its `RunDir`.
    """
    metadata = run_dir.metadata()
    rows = run_dir.metrics()
    row: dict[str, Any] = {
        "run": run,
        "state": "finished" if metadata.get("status") == "finished" else "interrupted",
        "data": Path(str(metadata.get("data", {}).get("name", ""))).name,
        "started": metadata.get("created"),
        "epoch": len(rows),
        "epochs": _epochs(run_dir, metadata),
        **_accuracy(metadata, rows, run_dir.evaluations()),
    }
    if row["state"] != "finished":
        row["trainer"] = run_dir.trainer()
        if rows:
            row["images_per_second"] = rows[-1]["images_per_second"]
            each = statistics.median(each["seconds"] for each in rows[-RECENT_EPOCHS:])
            row["seconds_left"] = each * max(0, row["epochs"] - len(rows))
    return row


def _epochs(run_dir: Any, metadata: Mapping[str, Any]) -> int:
    """Return how many epochs the run has, or will have."""
    if "epochs" in metadata:
        return int(metadata["epochs"])
    shortened = metadata.get("shortened")  # to keep `train.minutes`
    if shortened:
        return int(shortened[-1]["epochs"])
    return int(run_dir.recipe().train.epochs)


def _accuracy(
    metadata: Mapping[str, Any],
    rows: Sequence[Mapping[str, float]],
    evaluations: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return accuracy, 95% interval and split: test if it was opened, otherwise validation."""
    tests = [each for each in evaluations if each.get("split") == "test"]
    if tests:
        low, high = tests[-1]["interval95"]
        return {"accuracy": tests[-1]["accuracy"], "low": low, "high": high, "split": "test"}
    if not rows:
        return {}
    is_finished = metadata.get("status") == "finished"
    epoch = int(metadata["kept_epoch"]) if is_finished else len(rows)
    accuracy = rows[epoch - 1]["val_accuracy"]
    # E.g. "379 of 2,527 training images held out ...".
    count = str(metadata["data"]["splits"].get("val", "")).partition(" ")[0].replace(",", "")
    if accuracy != accuracy or not count.isdecimal():  # no validation split
        return {}
    from convlens import metrics  # imports NumPy

    n = int(count)
    low, high = metrics.wilson_interval(round(accuracy * n), n)
    return {"accuracy": accuracy, "low": low, "high": high, "split": "validation"}


async def draw_curves(request: Request) -> JSONResponse:
    """Answer with the charts of one run, or those of several laid over each other, as HTML."""
    body = await read_json(request, RunsBody)
    workspace = workspace_of(request)
    paths = {run: workspace.path(run) for run in dict.fromkeys(body.runs)}
    job = workspace.jobs.data.submit(lambda job: _curves(paths), title="curves")
    return answer(await result_of(job))


def _curves(paths: Mapping[str, Path]) -> dict[str, str]:
    from convlens.reports.compare import overlaid_curves
    from convlens.reports.html import render_template
    from convlens.reports.sections import training_curves
    from convlens.run import RunDir

    found = [(run, RunDir(path).metrics()) for run, path in paths.items() if path.is_dir()]
    found = [(run, rows) for run, rows in found if rows]
    if not found:
        return {"html": ""}
    if len(found) > 1:
        charts = overlaid_curves(found)
    else:
        ((run, rows),) = found
        charts = training_curves(rows, RunDir(paths[run]).metadata().get("kept_epoch"))
    return {"html": str(render_template("compare-curves.html", charts=charts, omitted=0))}


async def stop_training(request: Request) -> JSONResponse:
    """Ask the process that trains a run to stop, as Ctrl-C does: everything is saved."""
    body = await read_json(request, StopBody)
    path = workspace_of(request).path(body.run)
    await asyncio.to_thread(_stop, path)
    return answer({"run": body.run})


def _stop(path: Path) -> None:
    """Send SIGTERM to the process that trains the run.

    Raises:
        UsageError: it is not being trained, or not by a process that this one may stop.
        ModelFileError: `trainer.json` is damaged.
    """
    from convlens.run import RunDir

    trainer = RunDir(path).trainer()
    running = process.is_running(trainer) if trainer else False
    if trainer is None or running is False:
        raise UsageError("the run is not being trained", fix="reload the page")
    if running is None:
        raise UsageError(
            f"the run is trained on another machine ({str(trainer['host'])[:100]})",
            fix="stop it there with Ctrl-C",
        )
    try:
        os.kill(trainer["pid"], signal.SIGTERM)
    except PermissionError as error:
        raise UsageError(
            "the run is trained by another user of this machine", fix="ask them to stop it"
        ) from error
    except ProcessLookupError:  # it has just ended
        return
