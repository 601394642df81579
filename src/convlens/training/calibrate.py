"""After the last epoch: fit the temperature and thresholds, and store them in the model file.

It is a function of the weights in the model file, of the images and of the seed. A run that is
killed before or during this step computes it again, with the same bits.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from rich.markup import escape

from convlens.data.cache import IndexedRows
from convlens.data.splits import Split
from convlens.data.types import IndexedStrings
from convlens.engine.inference import (
    ModelOutputs,
    has_penultimate_layer,
    place_model,
    split_outputs,
)
from convlens.recipe import Recipe
from convlens.run import LoadedModel, RunDir, load_model
from convlens.training.setup import TrainingJob
from convlens.uncertainty import outliers
from convlens.uncertainty.calibration import ModelCalibration, ValidationOutputs, fit_calibration
from convlens.utils.console import print_status, progress_bar

LATE_SHARE = 0.1  # of the epochs: those that get half of a promise's delta


def calibrate_model(job: TrainingJob, run_dir: RunDir) -> None:
    """Fit a `ModelCalibration` for the weights in the model file, and add it to the file.

    Nothing is done without a validation split or with `train.calibrate=false`. Rank 0 computes;
    the caller makes the other ranks wait.
    """
    recipe = job.recipe
    if not (recipe.train.calibrate and recipe.data.validates and len(job.data.val)):
        return
    if not job.context.is_main_process:
        return
    loaded = load_model(run_dir.model_path)
    calibration = fit_calibration(
        _validation_outputs(job, loaded),
        seed=recipe.train.seed,
        candidates=num_candidates(recipe, int(loaded.model_metadata["chosen"]["epoch"])),
        classes=len(loaded.classes),
        groups=job.data.val_groups,
    )
    run_dir.add_calibration(calibration)
    if not job.context.quiet:
        print_status(f"[bold]{escape(run_dir.name)}[/]: {describe_calibration(calibration)}")


def num_candidates(recipe: Recipe, kept_epoch: int) -> int:
    """Return by what a promise divides its delta, because validation images chose the epoch.

    A union bound over all epochs. Half of delta is shared by the last tenth of the epochs, which
    are kept most often, and half by the others; the shares do not depend on the training. Patience
    chooses, too, even if the last weights are kept.
    """
    epochs = int(recipe.train.epochs)
    chooses = recipe.train.keep == "best" or recipe.train.patience is not None
    if not chooses or epochs == 1:
        return 1
    late = math.ceil(epochs * LATE_SHARE)
    return 2 * late if kept_epoch > epochs - late else 2 * (epochs - late)


def describe_calibration(calibration: ModelCalibration) -> str:
    """Return what was stored, in one line."""
    if calibration.temperature == 1:
        parts = ["no temperature (none differs from 1 on these validation images)"]
    else:
        parts = [f"temperature {calibration.temperature:.3f}"]
    reserved, detector = calibration.reserved, calibration.detector
    if reserved is not None:
        unit = "groups" if reserved.grouped else "images"
        parts.append(f"{len(reserved):,} validation {unit} reserved for promises")
    if detector is not None and detector.reference is not None:
        vectors, kilobytes = len(detector.reference), detector.reference.nbytes / 1000
        parts.append(f"features of {vectors:,} training images ({kilobytes:,.0f} kB)")
    return f"the model file has {', '.join(parts)}"


def _validation_outputs(job: TrainingJob, loaded: LoadedModel) -> ValidationOutputs:
    """Run the network on the validation images and on the training images to be stored."""
    data, recipe = job.data, job.recipe
    # As every validation, and without timing memory formats, which would change the last digits.
    plan = place_model(loaded.model, job.plan.device)
    plan = replace(plan, memory_format=job.plan.memory_format)
    plan.prepare_model(loaded.model)
    with_features = recipe.train.calibrate is True and has_penultimate_layer(loaded.model)
    references = recipe.train.reference_images or outliers.MAX_VECTORS
    total = len(data.val) + references * with_features
    with progress_bar("calibrating", total, shown=not job.context.quiet) as bar:

        def run(split: Split) -> ModelOutputs:
            return split_outputs(
                loaded.model,
                split,
                loaded.preprocessing.normalize,
                plan,
                None,
                advance=bar.advance,
                with_features=with_features,
            )[0]

        outputs = run(data.val)
        reference = None
        if outputs.features is not None:
            count = min(references, outliers.max_vectors(outputs.features.shape[1]))
            seed = recipe.train.seed
            chosen = outliers.choose_reference(data.train.labels.numpy(), count, seed)
            index = torch.from_numpy(chosen)
            rows, ids = IndexedRows(data.train.rows, index), IndexedStrings(data.train.ids, chosen)
            reference = run(Split(rows, data.train.labels[index], ids)).features
    return ValidationOutputs(
        outputs.logits.cpu().numpy(),
        data.val.labels.numpy(),
        None if outputs.features is None else outputs.features.cpu().numpy(),
        None if reference is None else reference.cpu().numpy(),
    )
