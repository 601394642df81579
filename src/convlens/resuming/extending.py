"""More epochs for a finished run: a new run that begins where the finished one ended.

The rule: the new run is the longer recipe from the finished run's last step on. Where nothing in
the recipe goes by the length of the run (a constant rate, no windows) and patience didn't end it,
it ends with the bits of the longer recipe trained from its beginning. Elsewhere it doesn't: a
schedule goes on from where it would be by then (cosine after 30 of 60 epochs is at half its
rate again, though it had been at 0), and patience that ran out counts anew.
"""

from __future__ import annotations

from rich.markup import escape

from convlens import run
from convlens.errors import ConvlensError, ModelFileError, UsageError
from convlens.formats import modelfile
from convlens.recipe import Recipe
from convlens.run import RunFolder
from convlens.system import files
from convlens.system.console import print_status

OF_ITS_END = (
    "created", "status", "epochs", "kept_epoch", "training_seconds", "cpu_seconds",
    "metrics_sha256", "changed",
)  # fmt: skip


def extend(place: RunFolder, asked: Recipe) -> None:
    """Makes `place` an unfinished run of `asked` that has done all that a shorter one did.

    Does nothing where the run is there already. The finished run is left as it is.

    Raises:
        UsageError: no finished run of this recipe with fewer epochs; ModelFileError: its state,
            which `state/` keeps for this, or its model is gone or damaged.
    """
    with place.lock():
        if place.facts():
            return
        source = _shorter(asked)
        resolved = source.recipe()
        stored = source.state()
        if stored is None:
            raise ModelFileError(
                f"run {source.name!r} can't be extended: "
                + (source.corrupt_checkpoints or ["the checkpoint of its end is gone"])[0],
                where=str(source.path / "state"),
                fix="leave out --extend to train all epochs",
            )
        tensors, counters = stored
        model, card = modelfile.read(source.model_path)
        done = len(counters["rows"])
        longer = resolved.replace(**{"train.epochs": asked.train.epochs})
        best, patience = counters["best"], resolved.train.patience
        impatient = patience is not None and best["stale"] >= patience
        exact = _goes_by_no_length(longer) and not impatient
        best = {**best, "stale": 0} if impatient else best
        place.save_state(tensors, {**counters, "best": best})
        for name in ("split.csv", "images.csv.gz"):
            if (source.path / name).exists():
                files.write_atomic(place.path / name, (source.path / name).read_bytes())
        # Behind what can be lost (`run.place`): a model file is somebody's work.
        place.save_model(model, {**card, "run": place.name})
        facts = {k: v for k, v in source.facts().items() if k not in OF_ITS_END}
        told = {"run": source.name, "epochs": done, "exact": exact}
        digests = [asked.digest(), longer.digest()]
        place.create(longer, {**facts, "digests": digests, "extends": told})
    rule = (
        f"the same bits as {longer.train.epochs} epochs from the beginning"
        if exact
        else f"not the same as {longer.train.epochs} epochs from the beginning: what goes by the "
        "length of the run goes on from where it would be in the longer one"
    )
    print_status(f"extending [bold]{escape(source.name)}[/] from {done} epochs: {rule}")


def _shorter(asked: Recipe) -> RunFolder:
    """The finished run of the same recipe with the most epochs below those asked for."""
    epochs = asked.train.epochs
    if epochs == "auto":
        raise UsageError("--extend needs a number of epochs", fix="e.g. train.epochs=60 --extend")
    best, most = None, 0
    for other in run.runs():
        try:
            if not other.finished:
                continue
            its = int(other.recipe().train.epochs)
        except ConvlensError:
            continue  # damaged or edited: not the one that is meant
        kinds = [asked.replace(**{"train.epochs": each}).digest() for each in (its, "auto")]
        same = set(kinds) & set(other.facts().get("digests", []))
        if same and most < its < epochs:
            best, most = other, its
    if best is None:
        raise UsageError(
            f"there is no finished run of this recipe with fewer than {epochs} epochs to extend",
            where=f"{run.MODELS}/",
            fix="leave out --extend to train all epochs; nothing but train.epochs may differ",
        )
    return best


def _goes_by_no_length(recipe: Recipe) -> bool:
    """Whether no step depends on how many there will be."""
    options = recipe.optim
    windows = [group for group in options.groups if (group.start, group.end) != (0.0, 1.0)]
    constant = options.schedule == "constant" and not options.warmup
    return constant and not (windows or options.head_first or options.lookahead)
