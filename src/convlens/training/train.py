"""A whole training, from a recipe to a tested model. Read this module first.

    recipe -> data -> model -> training loop -> run directory -> evaluate

`train` finds or creates the run and trains it. `fit` is the loop over the records of the engine:
it displays progress, validates after each epoch, saves checkpoints and stops.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from rich.markup import escape

from convlens import evaluation, optim, run_plots, user_code
from convlens.data.conversion import ChooseSize, pixel_warnings, recorded_conversion
from convlens.data.dataset import Data, load_data
from convlens.data.decode import Conversion
from convlens.data.sources import data_path, is_available, is_same_data
from convlens.device import (
    Plan,
    describe_hardware,
    prepare,
    preserve_rng,
    preserve_torch_settings,
    synchronize,
)
from convlens.distributed import ProcessGroup
from convlens.engine.data_parallel import DataParallel
from convlens.engine.inference import validation_metrics
from convlens.engine.loop import Epoch, NonFiniteLoss, Records, Step, TrainLoop
from convlens.errors import (
    ConvlensError,
    DataError,
    ModelFileError,
    ResourceError,
    Stopped,
    UsageError,
)
from convlens.recipe import DataConfig, Recipe
from convlens.run import (
    VALIDATION_COLUMNS,
    RunDir,
    check_run_name,
    check_same_images,
    find_or_create_run_dir,
    list_runs,
    recorded_data_names,
    runs_with_name,
    shared_run_dir,
)
from convlens.runtime import RuntimeContext
from convlens.training import time_budget, transfer
from convlens.training.autotune import check_device_options
from convlens.training.calibrate import calibrate_model
from convlens.training.checkpoint import (
    CheckpointManager,
    EpochClock,
    extend_run,
    load_initial_state,
    model_snapshot,
)
from convlens.training.feature_cache import TimedBatches
from convlens.training.pretrained import check_weights_available, run_of_weights
from convlens.training.resolve import is_run_of, validate_recipe, with_data_name
from convlens.training.setup import TrainingJob, build_training_job
from convlens.utils import files
from convlens.utils.console import (
    format_duration,
    is_first_time,
    print_status,
    print_table,
    progress_display,
    quiet_mode,
)
from convlens.utils.process import StopSignal, catch_stop_signals
from convlens.version import __version__

# Disk space per parameter: 4 bytes in the model file, and 8 (with one moment of the optimizer) in
# each of two checkpoints.
MIN_BYTES_PER_PARAMETER = 20
# Short names of the augmentations that `auto` chooses.
AUGMENT_NAMES = {
    "RandomHorizontalFlip": "flip",
    "RandomCrop": "crop",
    "RandomResizedCrop": "crop",
    "ColorJitter": "jitter",
    "RandomAffine": "rotate and shift",
}
# The facts about the hardware that the last digits of a training depend on.
BIT_RELEVANT_HARDWARE = ("device", "gpu", "cpu", "cpu_capability", "threads", "torch")


@preserve_torch_settings()
@preserve_rng()
def train(
    recipe: Recipe,
    *,
    name: str | None = None,
    is_unmodified_recipe: bool = False,
    fresh: bool = False,
    extend: bool = False,
    test: bool = True,
    device: str | None = None,
    quiet: bool = False,
    started: float | None = None,
) -> RunDir:
    """Train `recipe` in its run directory, or find the finished run of the same recipe.

    Under `torchrun` every process calls this; only rank 0 writes files and prints messages.

    Args:
        name: name of the run. Default: the name of the recipe, followed by six digits of its
            hash unless `is_unmodified_recipe`.
        fresh: train in a new directory, even if there is a run of this recipe.
        extend: start where a finished run of this recipe with fewer epochs ended (`extend_run`).
        test: evaluate the test split once at the end, with the weights that validation selected.
        device: e.g. `cpu`, `cuda:1`; by default the best one available.
        started: when the time of `train.minutes` began, as `time.monotonic`; by default now.

    Raises:
        ConvlensError: a problem the user can fix.
        KeyboardInterrupt: after Ctrl-C, with everything saved.
    """
    started = time.monotonic() if started is None else started
    check_run_name(name)
    context = RuntimeContext.create(device, quiet=quiet)
    # A restart by torchrun resumes the run that its first attempt created.
    fresh = fresh and not context.process_group.restarted
    plain_name = is_unmodified_recipe or name is not None
    run_dir = shared_run_dir(
        context.process_group,
        lambda: _find_run_dir(recipe, name, context, plain_name=plain_name, fresh=fresh),
    )
    if recipe.code:
        _check_code(recipe, run_dir, context)
    if extend:
        context.broadcast(lambda: extend_run(run_dir, recipe))
    data = None
    if context.broadcast(lambda: run_dir.is_finished):
        print_status(
            f"[bold]{run_dir.name}[/] is already trained: {run_dir.path} (--fresh trains it again)"
        )
    else:
        requested, recorded = recipe, context.broadcast(lambda: _recorded_recipe(run_dir))
        if recorded:  # what was chosen when the run started holds, whatever is installed now
            recipe = transfer.with_recorded_choices(requested, Recipe.model_validate(recorded))
        backbones = context.broadcast(partial(transfer.backbones_for, recipe))
        validate_recipe(recipe)
        if fresh:
            print_status(
                f"[bold]{run_dir.name}[/] is new; without --fresh the same command continues it"
            )
        if not context.broadcast(run_dir.metadata):
            check_weights_available(transfer.choose_start(recipe, None, backbones).recipe.model)
        check_device_options(recipe, context.device)
        prepare(recipe.train.deterministic, context.device)
        budget = None
        choose_size: ChooseSize = partial(transfer.choose_image_size, recipe, backbones)
        if time_budget.is_open(recipe) and not context.broadcast(run_dir.metadata):
            budget = time_budget.TimeBudget(recipe, backbones, started, context)
            choose_size = partial(time_budget.image_size_that_fits, recipe, backbones, budget)
        classes = context.broadcast(lambda: _recorded_classes(run_dir.metadata()))
        data = _load_data(recipe, recorded, classes, context, choose_size)
        with quiet_mode(quiet):
            data.print_interpretation()
        with _lock(run_dir, context):
            metadata = context.broadcast(run_dir.metadata)
            check_can_resume(run_dir, metadata, requested, data)
            # Another process may have finished the run while this one was loading the images.
            if not context.broadcast(lambda: run_dir.is_finished):
                if not metadata and not quiet:
                    data.print_similar_images()
                job = _build_job(
                    recipe, data, run_dir, metadata, context, None if metadata else budget
                )
                with run_dir.recorded_trainer():
                    rows, kept_epoch = fit(job, run_dir)
                    _finish(job, run_dir, rows, kept_epoch)
    if test:
        evaluation.evaluate(run_dir, "test", device=device, quiet=quiet, own_data=data)
    return run_dir


@contextlib.contextmanager
def _lock(run_dir: RunDir, context: RuntimeContext) -> Iterator[None]:
    """Hold the lock of a run; if its training never starts, no empty directory is left."""
    try:
        with run_dir.lock():
            yield
    except ConvlensError:
        if context.is_main_process:
            run_dir.remove_if_empty()
        raise


def _find_run_dir(
    recipe: Recipe, name: str | None, context: RuntimeContext, *, plain_name: bool, fresh: bool
) -> RunDir:
    """Return the run of a recipe, also if its data set has moved since; else a new directory."""
    run_dir = find_or_create_run_dir(
        name or recipe.name,
        recipe.digest(),
        plain_name=plain_name,
        fresh=fresh,
        is_run_of=partial(is_run_of, recipe),
    )
    if fresh or run_dir.metadata():
        return run_dir
    return _find_run_of_moved_data(recipe, name, context) or run_dir


def _check_code(recipe: Recipe, run_dir: RunDir, context: RuntimeContext) -> None:
    """Say that a run is new because user code has changed since another run of the same recipe.

    Raises:
        UsageError: the source is another one on this rank than on rank 0.
    """
    if context.broadcast(lambda: recipe.code) != recipe.code:
        raise UsageError(
            f"not all processes have the same source of {', '.join(recipe.code)}",
            fix="copy the file to all machines",
        )
    if not context.is_main_process or run_dir.metadata():
        return
    for other in list_runs():
        try:
            code = other.recipe().code
        except ConvlensError:
            continue
        before = recipe.model_copy(update={"code": code})
        changed = [name for name, sha256 in recipe.code.items() if code.get(name) != sha256]
        if changed and code.keys() == recipe.code.keys() and other.has_digest(before.digest()):
            copies = other.path / user_code.COPIES_FOLDER
            print_status(
                f"{escape(', '.join(changed))} has changed since run [bold]{escape(other.name)}[/] "
                f"(its copy: {escape(str(copies))}): this is another run"
            )


def _find_run_of_moved_data(
    recipe: Recipe, name: str | None, context: RuntimeContext
) -> RunDir | None:
    """Return the run of this recipe on the same images, which had another name; None without one.

    The images are compared by their fingerprint. They are loaded only if there is a run of the
    same recipe whose data set does not exist any more, neither at its old place nor where it was
    found since. A copy of a data set gets runs of its own.
    """
    path = data_path(recipe.data.name)
    for run_dir in runs_with_name(name) if name is not None else list_runs():
        try:
            metadata = run_dir.metadata()
        except ModelFileError:  # a damaged run.json of another run
            continue
        names = recorded_data_names(metadata)
        if path is None or not names or is_available(names[0]):
            continue
        if is_run_of(recipe, run_dir):
            return run_dir
        before = with_data_name(recipe, names[0])
        is_gone = not any(map(is_available, names))
        if not is_gone or not run_dir.has_digest(before.digest(), before.earlier_digest()):
            continue
        data = load_data(
            recipe.data,
            memory_budget=context.memory_budget,
            conversion=_recorded_conversion(_recorded_recipe(run_dir)),
            known_classes=_recorded_classes(metadata),
        )
        if data.fingerprint == metadata["data"].get("fingerprint"):
            run_dir.record_data_path(path)
            print_status(
                f"{escape(recipe.data.name)} holds the images of run [bold]"
                f"{escape(run_dir.name)}[/], which were at {escape(names[0])}"
            )
            return run_dir
    return None


def _load_data(
    recipe: Recipe,
    recorded: Mapping[str, Any],
    classes: list[str],
    context: RuntimeContext,
    choose_size: ChooseSize,
) -> Data:
    """Load the data set on every rank; one rank per machine decodes first and fills the cache.

    Args:
        recorded: The resolved recipe of an interrupted run, whose images are converted as at its
            start; empty for a new run.
        classes: Of an interrupted run, in the order of its network; empty for a new run.
        choose_size: Chooses the image size of a new run if the recipe leaves it open.
    """
    with context.process_group.local_rank_zero_first():
        data = load_data(
            recipe.data,
            memory_budget=context.memory_budget,
            conversion=_recorded_conversion(recorded),
            known_classes=classes,
            choose_size=choose_size,
        )
    for warning in pixel_warnings(data.train.rows):
        print_status(escape(warning))
    check_same_images(context.process_group, data.name, data.fingerprint)
    return data


def _recorded_conversion(recorded: Mapping[str, Any]) -> Conversion | None:
    """Return the conversion of a run from its resolved recipe; None if that is empty."""
    return recorded_conversion(DataConfig(**recorded["data"])) if recorded else None


def _recorded_classes(metadata: Mapping[str, Any]) -> list[str]:
    """Return the classes of a run in the order of its network; empty if they are unknown."""
    data = metadata.get("data")
    return list(data.get("classes", ())) if isinstance(data, Mapping) else []


def _recorded_recipe(run_dir: RunDir) -> dict[str, Any]:
    """Return the resolved recipe of a run; empty if the run is new or its recipe is damaged."""
    if not run_dir.metadata():
        return {}
    try:
        return run_dir.recipe().model_dump(mode="json")
    except ConvlensError:  # damaged or edited; `check_can_resume` compares the images
        return {}


def _build_job(
    recipe: Recipe,
    data: Data,
    run_dir: RunDir,
    metadata: Mapping[str, Any],
    context: RuntimeContext,
    budget: time_budget.TimeBudget | None,
) -> TrainingJob:
    """Build the job of a new run, or that of an interrupted run from what it left behind."""
    if context.is_main_process:
        _clean_stale_files(run_dir, metadata)
    initial_state = load_initial_state(run_dir)
    job = build_training_job(
        recipe,
        data,
        context,
        plan=_stored_plan(metadata, context.device),
        initial_state=initial_state,
        budget=budget,
    )
    for each in metadata.get("shortened", []):
        job.shorten(each["after"], each["epochs"])
    if not metadata:
        parameters = sum(parameter.numel() for parameter in job.model.parameters())
        files.warn_if_low_disk(run_dir.path, MIN_BYTES_PER_PARAMETER * parameters)
        run_dir.write_split(data.held_out)
        if data.listing is not None and context.is_main_process:
            data.listing.write(run_dir.path)
        if context.is_main_process:
            _inherit_test_uses(run_dir, job.recipe, data)
        # Last: from here on the directory is a run.
        run_dir.create(job.recipe, _run_metadata(recipe, job))
        if job.start_reason and not context.quiet and is_first_time(job.start_reason):
            print_status(escape(job.start_reason))
        if job.time_choice and not context.quiet:
            print_status(escape(job.time_choice))
        choices = describe_choices(recipe, job)
        if choices and not context.quiet and is_first_time(choices):
            print_status(choices)
    elif initial_state is None and job.initial_weights:
        # Interrupted before its first checkpoint: the run starts from the pretrained weights
        # again, whose file may have changed since.
        run_dir.update_metadata({"weights": job.initial_weights})
    report_setup_changes(run_dir, metadata, _environment(job))
    _print_stages(job)
    return job


def _inherit_test_uses(run_dir: RunDir, recipe: Recipe, data: Data) -> None:
    """Count the uses of the test split by the run that a new run starts from on the same data."""
    source = run_of_weights(recipe.model)
    if source is None:
        return
    names = recorded_data_names(source.metadata())
    if any(is_same_data(name, recipe.data.name) for name in names):
        run_dir.inherit_test_uses(source, data.fingerprint)


def _clean_stale_files(run_dir: RunDir, metadata: Mapping[str, Any]) -> None:
    """Remove leftovers of an interrupted run before starting or resuming."""
    if not metadata:
        run_dir.checkpoints.clear()  # of an extension that was killed before it became a run
    elif metadata.get("status") == "finished":
        run_dir.update_metadata({"status": "training"})  # its model file was lost


def _stored_plan(metadata: Mapping[str, Any], device: str) -> Plan | None:
    """Return the plan of an interrupted run, if it ran on the same kind of device."""
    stored = metadata.get("plan") or {}
    same_kind = str(stored.get("device")).partition(":")[0] == device.partition(":")[0]
    return Plan.from_dict({**stored, "device": device}) if same_kind else None


def describe_choices(requested: Recipe, job: TrainingJob) -> str:
    """Return what `auto` chose and about how long the training takes; empty without either."""
    recipe, chosen = job.recipe, list[str]()
    is_built_in = job.data.listing is None  # its images have one size
    if requested.data.image_size == "auto" and not is_built_in and not job.time_choice:
        chosen.append(f"{recipe.data.image_size} px")
    if requested.train.epochs == "auto" and not job.time_choice:
        chosen.append(f"{job.epochs} epochs")
    if requested.augment == "auto":
        names = [AUGMENT_NAMES.get(name, name) for name, _ in recipe.operations]
        chosen.append(f"augment {' + '.join(names)}" if names else "no augmentation")
    if job.timings:
        chosen.append(f"{job.plan.precision} {job.plan.memory_format}")
    seconds = job.expected_seconds
    if not chosen and seconds is None:
        return ""
    head = f"auto: {', '.join(chosen)}" if chosen else f"{job.epochs} epochs"
    time = ""
    if seconds is not None:
        limit = "at most " * (recipe.train.patience is not None)
        time = f"; {limit}about {format_duration(seconds)} on this machine"
    return f"{head}, batch {recipe.train.batch_size}{time}"


def _print_stages(job: TrainingJob) -> None:
    """Print a table of the stages, unless all of them are trained at the same rate."""
    rows = optim.stage_table(job.model, job.optimizer)
    if job.recipe.model.trainable != "all" or len({row.cells()[3:] for row in rows}) > 1:
        columns = ("stage", "weights", "trainable", "learning rate", "of the training")
        print_table(columns, (row.cells() for row in rows))


def fit(job: TrainingJob, run_dir: RunDir) -> tuple[list[dict[str, float]], int]:
    """Train until the last epoch, until patience is exhausted, or until a signal arrives.

    Returns:
        The rows of `metrics.csv`, and the epoch of the weights in the model file.

    Raises:
        Stopped, KeyboardInterrupt: a signal arrived; everything is saved and the run can be
            resumed.
        NonFiniteLoss: the training diverged; the last finite weights are saved.
    """
    checkpoints = CheckpointManager(job, run_dir)
    state, steps = job.state, len(job.inputs.batches)
    steps_done = (state.epoch - 1) * steps + state.step
    if steps_done:
        print_status(
            f"resuming [bold]{run_dir.name}[/] after {steps_done} of {job.epochs * steps} steps"
        )
    started = time.monotonic()
    last_step = replace(state)  # the state after the last step of an epoch, before validation
    with (
        catch_stop_signals() as signal,
        progress_display(
            job.epochs,
            steps,
            steps_done,
            monitor=job.recipe.train.monitor,
            shown=not job.context.quiet,
            validation_work=job.validation_work,
            expected_s=job.expected_seconds,
        ) as display,
        job.process_group.annotate_errors(lambda: f"epoch {state.epoch}, after step {state.step}"),
    ):
        process_group = job.process_group.with_stop_requested(lambda: signal.is_set)
        clock = EpochClock(state)
        for record in _training_records(job, process_group, run_dir, checkpoints):
            if isinstance(record, Step):
                display.step(record)
                if record.step == record.steps:
                    last_step = replace(state)
                stop = process_group.should_stop(now=False)
            else:
                synchronize(job.plan.device)
                seconds, cpu_seconds = clock.read()
                row = _validate(job, record, signal, seconds=seconds)
                if row is None:  # interrupted: the resumed run starts with this validation
                    state.assign(last_step)
                else:
                    row["data_seconds"], state.data_seconds = state.data_seconds, 0.0
                    row["cpu_seconds"] = process_group.all_reduce_sum(cpu_seconds)
                    # Every rank decides by the numbers of rank 0.
                    row = process_group.broadcast(partial(dict, row))
                    checkpoints.on_epoch_end(row)
                    display.epoch(row, checkpoints.best.epoch)
                    if job.deadline is not None and _keep_deadline(job, run_dir, started):
                        display.shorten(job.epochs)
                    clock.restart()
                stop = process_group.should_stop(now=True)
            if stop or checkpoints.is_finished or checkpoints.should_save:
                state.seconds, state.cpu_seconds = clock.read()
                checkpoints.save()
            if checkpoints.is_finished:
                break
            if stop:
                _stop(job, run_dir, signal)
        if process_group.should_stop(now=True):  # before the test, and before another run starts
            _stop(job, run_dir, signal)
    rows = checkpoints.rows
    keeps_last = job.recipe.train.keep == "last"
    return rows, int(rows[-1]["epoch"]) if keeps_last else checkpoints.kept_epoch()


def _keep_deadline(job: TrainingJob, run_dir: RunDir, started: float) -> bool:
    """Shorten the rest of the training if it would take too long. Rank 0 decides for all.

    Args:
        started: when the first epoch started, as `time.monotonic`.

    Returns:
        Whether the training was shortened.
    """
    deadline, done = job.deadline, job.state.epoch - 1
    if deadline is None or done >= job.epochs:
        return False

    def decide() -> int:
        return time_budget.epochs_that_fit(
            job.epochs,
            done,
            seconds_per_epoch=(time.monotonic() - started) / done,
            seconds_left=deadline.left() - job.end_seconds,
        )

    epochs = job.process_group.broadcast(decide)
    if epochs >= job.epochs:
        return False
    print_status(
        f"slower than expected: {epochs} instead of {job.epochs} epochs fit into {deadline}"
    )
    job.shorten(done, epochs)
    run_dir.update_metadata({"shortened": job.shortened})
    return True


def run_train_loop(job: TrainingJob, process_group: ProcessGroup) -> Records:
    """Train the part of the network that `job.inputs` names, from `job.state` on; yield records."""
    loop = TrainLoop(
        job.inputs.model,
        job.optimizer,
        job.criterion,
        job.plan,
        clip_value=job.recipe.optim.clip_value,
        clip_norm=job.recipe.optim.clip_norm,
        averager=job.averager,
        scaler=job.scaler,
        data_parallel=(
            DataParallel(process_group, job.inputs.batches.sizes)
            if process_group.size > 1
            else None
        ),
        # Optimizers of users do not know the flag that skips an update on the device.
        check_loss_synchronously=optim.is_user_optimizer(job.recipe.optim.name) or None,
    )
    return loop.run(
        TimedBatches(job.inputs.batches, job.state),
        job.schedule,
        epochs=job.epochs,
        seed=job.recipe.train.seed,
        state=job.state,
    )


def _training_records(
    job: TrainingJob, process_group: ProcessGroup, run_dir: RunDir, checkpoints: CheckpointManager
) -> Records:
    """Yield the records of the training loop; when it fails, first save what can be saved."""
    if checkpoints.is_finished:  # the run was interrupted after its last step
        checkpoints.write_missing_files()
        return
    try:
        while True:
            epochs = job.epochs
            for record in run_train_loop(job, process_group):
                yield record
                if job.epochs != epochs:  # shortened: go on with the new schedule
                    break
            else:
                return
    except (DataError, ResourceError):  # e.g. an image became unreadable: between two steps
        checkpoints.save()
        raise
    except NonFiniteLoss as error:
        _save_diverged(error, job, run_dir, checkpoints)
        raise


def _save_diverged(
    error: NonFiniteLoss, job: TrainingJob, run_dir: RunDir, checkpoints: CheckpointManager
) -> None:
    """Record the images of the step that diverged, and save the last finite weights."""
    error.locate_first_nonfinite(job.model, len(job.inputs.batches))
    indices = job.inputs.batches.sample_indices(error.epoch, error.step - 1)
    ids = [job.data.train.ids[index] for index in indices]
    run_dir.update_metadata(
        {"diverged": {"epoch": error.epoch, "step": error.step, "lr": error.lr, "images": ids}}
    )
    error.what += f" (images {', '.join(ids[:3])}{' ...: run.json lists all' * (len(ids) > 3)})"
    checkpoints.save_model_file()
    if not run_dir.model_path.exists():
        try:
            run_dir.save_model(*model_snapshot(job, run_dir.name, None))
        except ValueError as not_finite:
            error.where = f"{run_dir.path}; no weights were kept: {not_finite}"[:200]
            raise error from not_finite
    error.where = f"{run_dir.path}; its model.safetensors holds the last finite weights"


class _ValidationInterrupted(Exception):  # noqa: N818 (control flow)
    """Raised inside a validation to interrupt it."""


def _validate(
    job: TrainingJob, record: Epoch, signal: StopSignal, *, seconds: float
) -> dict[str, float] | None:
    """Return the row of an epoch in `metrics.csv`; None if a signal interrupted the validation.

    Training loss and accuracy are those measured while training; validation uses the averaged
    weights if there are any. Without a validation split its numbers are NaN. With several
    processes a validation is always completed, because the others wait for its results.
    """

    def check_signal(images: int) -> None:
        if signal.is_set and job.process_group.size == 1:
            raise _ValidationInterrupted

    validation = dict.fromkeys(VALIDATION_COLUMNS, math.nan)
    if job.recipe.data.validates:
        try:
            with optim.averaged_weights(job.averager):
                logits, targets = job.inputs.validate(check_signal)
        except _ValidationInterrupted:
            return None
        validation = validation_metrics(logits, targets)
    return {
        "epoch": record.epoch,
        "train_loss": float(record.loss),
        "train_accuracy": float(record.accuracy),
        **validation,
        "lr": record.lr,
        "seconds": seconds,
        "images_per_second": record.images / seconds,
    }


def _stop(job: TrainingJob, run_dir: RunDir, signal: StopSignal) -> None:
    """End the training between two steps. Everything is saved."""
    if not run_dir.model_path.exists():
        run_dir.save_model(*model_snapshot(job, run_dir.name, None))
    state = job.state
    if state.epoch > job.epochs:
        position = "after the last epoch"
    else:
        position = f"in epoch {state.epoch} after {state.step} steps"
    print_status(f"stopped {position}; everything is saved in {run_dir.path}")
    print_status("the same command resumes the training")
    # torchrun ends the other ranks as soon as one of them has ended: wait until all have saved.
    job.process_group.barrier()
    if signal.interrupted:
        raise KeyboardInterrupt
    raise Stopped(
        f"stopped by {signal.name}",
        where=str(run_dir.path),
        fix="run the same command again to resume",
    )


def _finish(
    job: TrainingJob, run_dir: RunDir, rows: list[dict[str, float]], kept_epoch: int
) -> None:
    """Calibrate the model, draw the plots of the training and mark the run as finished."""
    with quiet_mode(job.context.quiet):
        calibrate_model(job, run_dir)
    if job.context.is_main_process:
        run_plots.plot_training(run_dir, rows, kept_epoch, job.data, job.augment)
    # Last: a run that is killed before this resumes at its end, calibrates and draws its plots.
    run_dir.finish(
        epochs=len(rows),
        kept=kept_epoch,
        seconds=sum(row["seconds"] for row in rows),
        cpu_seconds=sum(row["cpu_seconds"] for row in rows),
    )
    job.process_group.barrier()


# ---- metadata of the run -----------------------------------------------------------------


def _run_metadata(requested: Recipe, job: TrainingJob) -> dict[str, Any]:
    """Return the metadata that `run.json` records when a run starts."""
    data = job.data
    parameters = list(job.model.parameters())
    path = data_path(requested.data.name)
    return {
        # The recipe as requested and as resolved: the commands of both mean this run.
        "digests": [requested.digest(), job.recipe.digest()],
        "data": {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "classes": list(data.classes),
            "splits": data.split_descriptions,
            "skipped": data.skipped,
            **({} if path is None else {"path": path}),
        },
        "weights": job.initial_weights,
        "plan": job.plan.to_dict(),
        "timings": job.timings,
        "parameters": sum(p.numel() for p in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        **_environment(job),
    }


def _environment(job: TrainingJob) -> dict[str, Any]:
    """Return what the last digits of a run depend on, besides its recipe and images."""
    return {
        "convlens": __version__,
        "world_size": job.process_group.size,
        "trunk_cached": job.inputs.cached_bytes > 0,
        "hardware": describe_hardware(job.plan.device),
    }


def check_can_resume(
    run_dir: RunDir, metadata: Mapping[str, Any], recipe: Recipe, data: Data
) -> None:
    """Refuse to resume a run with another recipe or other images than it started with.

    Raises:
        ResourceError: the run has another recipe.
        DataError: the images differ; the message lists how.
        ModelFileError: `run.json` does not say which images the run started with.
    """
    if not metadata:
        return
    digests = metadata.get("digests", [])
    is_known = recipe.digest() in digests or recipe.earlier_digest() in digests
    if not is_known and not is_run_of(recipe, run_dir):
        raise ResourceError(
            f"another process has just taken the name {run_dir.name!r} for another recipe",
            where=str(run_dir.path),
            fix="run the same command again, or give this run another name with --name",
        )
    original = metadata.get("data")
    if not isinstance(original, Mapping) or "fingerprint" not in original:
        raise ModelFileError(
            "run.json does not say which images this run started with",
            where=str(run_dir.path),
            fix="restore it from a copy, or train again with --fresh",
        )
    if original["fingerprint"] != data.fingerprint:
        changed = data.listing.changed(run_dir.path) if data.listing else ""
        raise DataError(
            f"the images of {data.name!r} are not those that run {run_dir.name!r} started with"
            + (f": {changed}" if changed else ""),
            where=str(run_dir.path),
            fix="restore the files, or train on the current images with --fresh",
        )


def report_setup_changes(
    run_dir: RunDir, metadata: Mapping[str, Any], current: Mapping[str, Any]
) -> None:
    """Print and record what differs from the setup that the run started on.

    The run is resumed all the same, but its bits will not be those of an uninterrupted run.

    Args:
        metadata: of the run; empty if it is new.
        current: `convlens`, `world_size` and `hardware` as they would be recorded now.
    """
    if not metadata:
        return
    before, now = _bit_relevant(metadata), _bit_relevant(current)
    changed = {
        key: [value, now[key]] for key, value in before.items() if key in now and value != now[key]
    }
    if not changed:
        return
    differences = ", ".join(f"{key} {old}, now {new}" for key, (old, new) in changed.items())
    print_status(
        f"resuming [bold]{escape(run_dir.name)}[/] on a different setup ({escape(differences)}): "
        "results will not be bit-identical to an uninterrupted run"
    )
    run_dir.update_metadata({**current, "changed": [*metadata.get("changed", []), changed]})


def _bit_relevant(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts that the last digits of a training depend on."""
    hardware = metadata.get("hardware")
    hardware = hardware if isinstance(hardware, Mapping) else {}
    facts = {key: hardware[key] for key in BIT_RELEVANT_HARDWARE if key in hardware}
    if "device" in facts:  # which one of several GPUs it is does not matter
        facts["device"] = str(facts["device"]).partition(":")[0]
    facts |= {key: metadata[key] for key in ("convlens", "trunk_cached") if key in metadata}
    return facts | {"processes": metadata.get("world_size", 1)}
