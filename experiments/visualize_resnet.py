"""The report's sixth script: activations after the first layers and after each basic block.

    python experiments/visualize_resnet.py [RUN ...] [IMAGE ...]

Shows the pretrained, the augmented and the raw model side by side, or the runs named. Images are
files, `test:17`, `worst:5`, `class:cat:3`; without any a few validation images are taken. The
models must be trained: `resnet_18_pre.py`, `resnet_tiny.py` and `resnet_18.py` do that.
"""

import sys
from pathlib import Path

import convlens

MODELS = {
    "the pretrained": ("resnet18-pretrained-last5-adam", "resnet_18_pre.py"),
    "the augmented": ("resnet18-tiny", "resnet_tiny.py"),
    "the raw": ("resnet18", "resnet_18.py"),
}


def trained(recipe: str) -> str | None:
    """The run of a recipe that was trained last: of its own name, or with its hash behind."""
    names = [recipe, recipe + "-" + "[0-9a-f]" * 6]
    files = [path for n in names for path in Path("models").glob(f"{n}/model.safetensors")]
    newest = max(files, key=lambda path: path.stat().st_mtime, default=None)
    return newest.parent.name if newest else None


def named(arguments: list[str]) -> list[str]:
    return [each for each in arguments if (Path("models") / each).is_dir()]


arguments = sys.argv[1:]
runs = named(arguments)
if not runs:
    found = {words: trained(recipe) for words, (recipe, _) in MODELS.items()}
    missing = [f"{words} ({MODELS[words][1]})" for words, run in found.items() if run is None]
    if missing:
        sys.exit(f"not trained yet: {', '.join(missing)}; or name runs that are")
    runs = [run for run in found.values() if run]
    for words, run in found.items():
        print(f"{words}: {run}")
images = [each for each in arguments if each not in runs]

try:
    look = convlens.look(runs, images)
except convlens.ConvlensError as error:
    sys.exit(str(error))
for seen in look.seen:
    answers = [f"{one.run}: {one.prediction[0]} {one.prediction[1]:.1%}" for one in seen]
    print(f"{seen[0].picture.name}  {'; '.join(answers)}")
for layers in zip(*(one.numbers() for one in look.seen[0]), strict=False):
    blank = "; ".join(f"{layer.blank} of {layer.channels} blank" for layer in layers)
    print(f"{layers[0].layer:<10} {blank}")
print(f"plots {look.opened.folder}")
