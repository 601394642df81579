"""The report's sixth script: activations after the first layers and after each basic block.

    python experiments/visualize_resnet.py [RUN ...] [IMAGE ...]

Shows the pretrained, the augmented and the raw model side by side, or the named runs. Images are
files, `test:17`, `worst:5` or `class:cat:3`; by default a few validation images are chosen. The
models must be trained by `resnet_18_pre.py`, `resnet_tiny.py` and `resnet_18.py` before.
"""

import sys
from pathlib import Path

import convlens
from convlens.cli import exit_on_errors
from convlens.errors import UsageError

MODELS = {
    "the pretrained": ("resnet18-pretrained-last5-adam", "resnet_18_pre.py"),
    "the augmented": ("resnet18-tiny", "resnet_tiny.py"),
    "the raw": ("resnet18", "resnet_18.py"),
}


def trained(recipe: str) -> str | None:
    """Return the latest run of a recipe, named like the recipe or with a hash appended."""
    names = [recipe, recipe + "-" + "[0-9a-f]" * 6]
    files = [path for n in names for path in Path("models").glob(f"{n}/model.safetensors")]
    newest = max(files, key=lambda path: path.stat().st_mtime, default=None)
    return newest.parent.name if newest else None


def find_runs(arguments: list[str]) -> list[str]:
    """Return the named runs, or else the latest run of each of the three recipes."""
    named = [each for each in arguments if (Path("models") / each).is_dir()]
    if named:
        return named
    latest = {title: trained(recipe) for title, (recipe, _) in MODELS.items()}
    missing = [f"{title} ({MODELS[title][1]})" for title, run in latest.items() if run is None]
    if missing:
        ignored = f" ({', '.join(arguments)}: not a run in models/)" if arguments else ""
        raise UsageError(
            f"not trained yet: {', '.join(missing)}{ignored}",
            fix="run these scripts, or name runs that are in models/",
        )
    for title, run in latest.items():
        print(f"{title}: {run}")
    return [run for run in latest.values() if run]


with exit_on_errors():
    runs = find_runs(sys.argv[1:])
    look = convlens.look(runs, [each for each in sys.argv[1:] if each not in runs])
    for seen in look.seen:
        answers = [f"{one.run}: {one.prediction[0]} {one.prediction[1]:.1%}" for one in seen]
        print(f"{seen[0].picture.name}  {'; '.join(answers)}")
    for layers in zip(*(one.numbers() for one in look.seen[0]), strict=False):
        blank = "; ".join(f"{layer.blank} of {layer.channels} blank" for layer in layers)
        print(f"{layers[0].layer:<10} {blank}")
    print(f"plots {look.opened.folder}")
