"""The demo of `make demo`: the digits recipe, from training to classified images."""

from __future__ import annotations

import csv
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

import convlens
from convlens.cli import exit_on_errors


@exit_on_errors()
def main() -> None:
    """Train (or find the finished run), test, and classify a few files of test images."""
    run = convlens.train("digits")
    result = run.evaluate("test", quiet=True)

    folder = Path("data/demo-digits")
    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    paths = []
    with (run.path / "split.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    for row in rows[:8]:  # images that the model was not trained on
        number = int(row["id"].partition("/")[2])
        path = folder / f"digit-{digits.target[number]}-{number}.png"
        Image.fromarray((digits.images[number] * 255 / 16).astype("uint8")).save(path)
        paths.append(path)
    print("\ntest image               says  sure")
    for answer in run.predict(paths):
        print(f"{Path(answer.filename).name:24s} {answer.label:>4s}  {answer.prob:.1%}")

    low, high = result.interval95
    print(f"\ntest accuracy {result.accuracy:.2%} (95% interval {low:.2%} to {high:.2%})")
    print(f"model  {run.path / 'model.safetensors'}")
    print(f"plots  plots/{run.name}/")
    print(f"next   .venv/bin/convlens predict {run.name} {folder}")


if __name__ == "__main__":
    main()
