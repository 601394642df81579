"""A whole training run, from recipe to tested model. The page to read first.

    recipe -> data -> model -> engine -> run folder -> evaluate

`train` finds or makes the run; `run_to_end` is the run itself: it reads the engine's records and
decides to log, validate, keep the best weights, save and stop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

from rich.markup import escape

from convlens import device, distributed, evaluation, optim, run, run_plots
from convlens.data.dataset import Data, load_data
from convlens.distributed import ProcessGroup
from convlens.engine import loop
from convlens.engine.inference import loss_and_accuracy
from convlens.errors import DataError, ModelFileError, ResourceError, Stopped
from convlens.recipe import Recipe
from convlens.run import RunDir
from convlens.training import autotune, checkpoint, pretrained
from convlens.training.checkpoint import (
    CheckpointManager,
    EpochClock,
    load_initial_weights,
    model_snapshot,
)
from convlens.training.resolve import validate_recipe
from convlens.training.setup import TrainingJob, build_training_job
from convlens.utils import files
from convlens.utils.console import print_status, print_table, progress_display
from convlens.utils.process import StopSignal, catch_stop_signals
from convlens.version import __version__

LEAST_BYTES = 20  # for each weight: in the model file, and with a moment in each of two states


@device.preserve_torch_settings()
@device.preserve_rng()
def train(
    recipe: Recipe,
    *,
    name: str | None = None,
    plain: bool = False,
    fresh: bool = False,
    extend: bool = False,
    test: bool = True,
    on: str | None = None,
    quiet: bool = False,
) -> RunDir:
    """Trains `recipe` in its run folder, or finds the finished run of the very same recipe.

    Args:
        name: the run's name; by default the recipe's (with a hash unless `plain`).
        plain: the recipe is as published, so the run takes the bare name.
        fresh: train anew in a new folder, whatever there is.
        extend: begin where a finished run of this recipe with fewer epochs ended (`extending`).
        test: evaluate the test split once at the end, with the weights already chosen.
        on: device, e.g. `cpu`, `cuda:1`; the best there is by default.

    Under `torchrun` all processes call this, and the first one alone writes and speaks.

    Raises:
        ConvlensError: what the user can mend; KeyboardInterrupt: after saving.
    """
    world = distributed.init_process_group()
    data = None
    run_name, plain = name or recipe.name, plain or name is not None
    fresh = fresh and not world.restarted  # a restart by torchrun resumes the run
    run_dir = run.shared_run_dir(
        world,
        lambda: run.find_or_create_run_dir(run_name, recipe.digest(), plain=plain, fresh=fresh),
    )
    if extend:
        world.broadcast(lambda: checkpoint.extend_run(run_dir, recipe))
    if world.broadcast(lambda: run_dir.finished):
        print_status(
            f"[bold]{run_dir.name}[/] is trained already: {run_dir.path} (--fresh trains anew)"
        )
    else:
        validate_recipe(recipe)
        if fresh:
            print_status(
                f"[bold]{run_dir.name}[/] is new; without --fresh the same command goes on with it"
            )
        if not world.broadcast(run_dir.metadata):
            pretrained.check_weights_available(recipe.model)
        where = device.select_device(on)
        autotune.check_device_options(recipe, where)
        device.prepare(recipe.train.deterministic, where)
        budget = device.memory_budget(where)
        with world.local_rank_zero_first():
            data = load_data(recipe.data, memory_budget=budget)
        run.check_same_images(world, data.name, data.fingerprint)
        with run_dir.lock():
            facts = world.broadcast(run_dir.metadata)
            check_can_resume(run_dir, facts, recipe, data)
            # Not if another command finished it while this one read the images.
            if not world.broadcast(lambda: run_dir.finished):
                _train_locked(recipe, data, run_dir, facts, where, world, quiet=quiet)
    if test:
        evaluation.evaluate(run_dir, "test", on=on, quiet=quiet, own=data)
    return run_dir


def _train_locked(
    recipe: Recipe,
    data: Data,
    run_dir: RunDir,
    facts: dict[str, Any],
    where: str,
    world: ProcessGroup,
    *,
    quiet: bool,
) -> None:
    """Begins the run, or takes it up; the lock on its folder is held."""
    if world.is_main_process:
        _clean_stale_files(run_dir, facts)
    begun = load_initial_weights(run_dir)
    setup = build_training_job(recipe, data, where, _stored_plan(facts, where), begun, world)
    if not facts:
        files.warn_if_low_disk(
            run_dir.path, LEAST_BYTES * sum(p.numel() for p in setup.trained.parameters())
        )
        run_dir.write_split(data.held_out)
        if data.listing is not None and world.is_main_process:
            data.listing.write(run_dir.path)
        run_dir.create(setup.recipe, _run_metadata(recipe, setup))  # last: from here on it is a run
    elif begun is None and setup.weights:
        # Left before its first state was saved: it begins anew, with the weights as they are now.
        run_dir.update_metadata({"weights": setup.weights})
    report_setup_changes(run_dir, facts, _environment(setup))
    _report_stages(setup)
    rows, kept = fit(setup, run_dir, quiet=quiet)
    if world.is_main_process:
        run_plots.plot_training(run_dir, rows, kept, data, setup.augment)
    # Last: a run that is killed before this takes itself up where it is and draws its plots.
    run_dir.finish(
        epochs=len(rows),
        kept=kept,
        seconds=sum(row["seconds"] for row in rows),
        cpu_seconds=sum(row["cpu_seconds"] for row in rows),
    )
    world.barrier()


def _clean_stale_files(run_dir: RunDir, facts: dict[str, Any]) -> None:
    """Clears up what would be mistaken for a part of the run that begins or is taken up."""
    if not facts:
        run_dir.checkpoints.clear()  # of an extension that was killed before it was a run
    elif facts.get("status") == "finished":
        run_dir.update_metadata(
            {"status": "training"}
        )  # its model file is lost; until it is there again


def _stored_plan(facts: dict[str, Any], where: str) -> device.Plan | None:
    """The plan of a run that is taken up on the same kind of device."""
    stored = facts.get("plan") or {}
    same = str(stored.get("device")).partition(":")[0] == where.partition(":")[0]
    return device.Plan.from_dict({**stored, "device": where}) if same else None


def _report_stages(setup: TrainingJob) -> None:
    """Says what learns and at which rate, where that isn't everything at the same one."""
    rows = optim.stage_table(setup.trained, setup.optimizer)
    if setup.recipe.model.trainable != "all" or len({row.cells()[3:] for row in rows}) > 1:
        columns = ("stage", "weights", "that learn", "learning rate", "of the training")
        print_table(columns, (row.cells() for row in rows))


def fit(setup: TrainingJob, run_dir: RunDir, *, quiet: bool) -> tuple[list[dict[str, float]], int]:
    """Trains until the recipe ends, nothing improves any more, or a signal comes.

    Returns the epochs' rows, and the epoch whose weights are in the model file.
    """
    options = setup.recipe.train
    keeper = CheckpointManager(setup, run_dir)
    if keeper.over:
        keeper.complete()
    steps = len(setup.feed.batches)
    done = (setup.state.epoch - 1) * steps + setup.state.step
    if done:
        print_status(
            f"continuing [bold]{run_dir.name}[/] after {done} of {setup.epochs * steps} steps"
        )
    state = setup.state
    unended = replace(state)  # the epoch at its last step
    with (
        catch_stop_signals() as flag,
        progress_display(setup.epochs, steps, done, shown=not quiet) as bar,
        setup.world.annotate_errors(lambda: f"epoch {state.epoch}, after step {state.step}"),
    ):
        clock = EpochClock(state)
        world = setup.world = setup.world.with_stop_requested(lambda: flag.is_set)
        for record in _training_records(setup, run_dir, keeper):
            if isinstance(record, loop.Step):
                bar.step(record)
                stop = world.should_stop(now=False)
                unended = replace(state) if record.step == record.steps else unended
            else:
                device.synchronize(setup.plan.device)
                seconds, cpu_seconds = clock.read()
                row = _validate(setup, record, flag, seconds=seconds)
                if row is None:  # who takes the run up validates first
                    for each in fields(state):
                        setattr(state, each.name, getattr(unended, each.name))
                else:
                    row["data_seconds"], state.data_seconds = state.data_seconds, 0.0
                    row["cpu_seconds"] = world.all_reduce_sum(cpu_seconds)
                    keeper.take(
                        world.broadcast(partial(dict, row))
                    )  # what it decides, all decide alike
                    bar.epoch(keeper.rows[-1], keeper.best.epoch)
                    clock.start()
                stop = world.should_stop(now=True)
            if stop or keeper.over or keeper.due:
                state.seconds, state.cpu_seconds = clock.read()
                keeper.save()
            if keeper.over:
                break
            if stop:
                _stop(setup, run_dir, flag)
        if world.should_stop(now=True):  # the run isn't tested then, nor is another one begun
            _stop(setup, run_dir, flag)
    rows = keeper.rows
    return rows, int(rows[-1]["epoch"]) if options.keep == "last" else keeper.kept()


def _training_records(
    setup: TrainingJob, run_dir: RunDir, keeper: CheckpointManager
) -> loop.Records:
    """The engine's records; what ends them first saves what can be saved."""
    if keeper.over:  # the run was left behind its last step
        return
    try:
        yield from setup.fit()
    except (DataError, ResourceError):  # images that can't be read any more: between two steps
        keeper.save()
        raise
    except loop.NonFiniteLoss as error:
        error.locate_first_nonfinite(setup.trained, len(setup.feed.batches))
        numbers = setup.feed.batches.numbers(error.epoch, error.step - 1)
        ids = [setup.data.train.ids[number] for number in numbers]
        told = {"epoch": error.epoch, "step": error.step, "lr": error.lr, "images": ids}
        run_dir.update_metadata({"diverged": told})
        error.what += f" (images {', '.join(ids[:3])}{' ...: run.json has all' * (len(ids) > 3)})"
        keeper.keep_weights()
        if not run_dir.model_path.exists():
            try:
                run_dir.save_model(*model_snapshot(setup, run_dir.name, None))
            except ValueError as unusable:  # the weights themselves are not finite
                error.where = f"{run_dir.path}; no weights were kept: {unusable}"[:200]
                raise error from unusable
        error.where = f"{run_dir.path}; its model.safetensors holds the last good weights"
        raise


class _ValidationInterrupted(Exception):
    """A validation is left in the middle."""


def _validate(
    setup: TrainingJob, record: loop.Epoch, flag: StopSignal, *, seconds: float
) -> dict[str, float] | None:
    """The epoch's row: training numbers as they were seen, validation with the kept weights.

    Without a validation split its numbers are NaN. None where a signal came in the middle (of
    several processes nobody leaves then).
    """

    def asked(images: int) -> None:
        if flag.is_set and setup.world.size == 1:
            raise _ValidationInterrupted

    val_loss = val_accuracy = math.nan
    if setup.recipe.data.validates:
        try:
            with optim.averaged_weights(setup.averager):
                logits, labels = setup.feed.validate(asked)
        except _ValidationInterrupted:
            return None
        val_loss, val_accuracy = loss_and_accuracy(logits, labels)
    return {
        "epoch": record.epoch,
        "train_loss": float(record.loss),
        "train_accuracy": float(record.accuracy),
        "val_loss": val_loss,
        "val_accuracy": val_accuracy,
        "lr": record.lr,
        "seconds": seconds,
        "images_per_second": record.images / seconds,
    }


def _stop(setup: TrainingJob, run_dir: RunDir, flag: StopSignal) -> None:
    """Stops between two steps, everything saved; the same command goes on from here."""
    if not run_dir.model_path.exists():
        run_dir.save_model(*model_snapshot(setup, run_dir.name, None))
    at = setup.state
    over = at.epoch > setup.epochs
    where = "after the last epoch" if over else f"in epoch {at.epoch} after {at.step} steps"
    print_status(f"stopped {where}; all of it is kept in {run_dir.path}")
    print_status("the same command goes on from here")
    setup.world.barrier()  # torchrun ends the others when the first has ended; all is saved now
    if flag.interrupted:
        raise KeyboardInterrupt
    raise Stopped(
        f"asked to stop ({flag.name})", where=str(run_dir.path), fix="run it again to go on"
    )


def _run_metadata(asked: Recipe, setup: TrainingJob) -> dict[str, Any]:
    """What `run.json` says of a run from its beginning."""
    data = setup.data
    return {
        # The recipe as asked for and as resolved: both commands mean this run.
        "digests": [asked.digest(), setup.recipe.digest()],
        "data": {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "classes": list(data.classes),
            "splits": data.how,
            "skipped": data.skipped,
        },
        "weights": setup.weights,
        "plan": setup.plan.to_dict(),
        "timings": setup.timings,
        "parameters": sum(p.numel() for p in setup.trained.parameters()),
        "trainable_parameters": sum(
            p.numel() for p in setup.trained.parameters() if p.requires_grad
        ),
        **_environment(setup),
    }


def _environment(setup: TrainingJob) -> dict[str, Any]:
    """What a run's last digits depend on beside its recipe and its images."""
    return {
        "convlens": __version__,
        "world_size": setup.world.size,
        "trunk_cached": setup.feed.cached_bytes > 0,
        "hardware": device.describe_hardware(setup.plan.device),
    }


# ---- continuing ----------------------------------------
# Whether a run can go on, and what is to be said if something isn't as it was when it began.
#
# Another recipe is another run, in a folder of its own. Other images end it. Another machine, another
# version or another number of processes may go on, but then the bits aren't those that an
# uninterrupted run would have ended with.

# What decides about last digits, of what `device.describe` says.
_HARDWARE = ("device", "gpu", "cpu", "cpu_capability", "threads", "torch")


def check_can_resume(run_dir: RunDir, facts: Mapping[str, Any], recipe: Recipe, data: Data) -> None:
    """Refuses to go on with another recipe or other images than the run began with.

    Raises:
        ResourceError: another recipe; DataError: other images, with what differs; ModelFileError:
            what `run.json` says can't be used.
    """
    if not facts:
        return
    if recipe.digest() not in facts.get("digests", []):
        raise ResourceError(
            f"another process has just taken the name {run_dir.name!r} for another recipe",
            where=str(run_dir.path),
            fix="run the same command again, or give this run another name with --name",
        )
    began = facts.get("data")
    if not isinstance(began, Mapping) or "fingerprint" not in began:
        raise ModelFileError(
            "run.json doesn't say on which images this run began",
            where=str(run_dir.path),
            fix="restore it from a copy, or train anew with --fresh",
        )
    if began["fingerprint"] != data.fingerprint:
        changed = data.listing.changed(run_dir.path) if data.listing else ""
        raise DataError(
            f"the images of {data.name!r} are not those that run {run_dir.name!r} began with"
            + (f": {changed}" if changed else ""),
            where=str(run_dir.path),
            fix="--fresh trains anew on the present images; or restore the files",
        )


def report_setup_changes(run_dir: RunDir, facts: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Says and notes what is no more as it was when the run began.

    Args:
        facts: of the run; none if it is new.
        now: `convlens`, `world_size` and `hardware` as they would be noted of a new run.
    """
    if not facts:
        return
    before, present = _bit_relevant_facts(facts), _bit_relevant_facts(now)
    changed = {k: [v, present[k]] for k, v in before.items() if k in present and v != present[k]}
    if not changed:
        return
    told = ", ".join(f"{key} {old}, now {new}" for key, (old, new) in changed.items())
    print_status(
        f"[bold]{escape(run_dir.name)}[/] began elsewise ({escape(told)}): it goes on, but will not "
        "end with the bits of an uninterrupted run"
    )
    run_dir.update_metadata({**now, "changed": [*facts.get("changed", []), changed]})


def _bit_relevant_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    hardware = facts.get("hardware")
    hardware = hardware if isinstance(hardware, Mapping) else {}
    named = {key: hardware[key] for key in _HARDWARE if key in hardware}
    if "device" in named:  # which of several GPUs it is decides nothing
        named["device"] = str(named["device"]).partition(":")[0]
    if "convlens" in facts:
        named["convlens"] = facts["convlens"]
    if "trunk_cached" in facts:
        named["trunk_cached"] = facts["trunk_cached"]
    return named | {"processes": facts.get("world_size", 1)}
