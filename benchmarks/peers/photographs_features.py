"""Features of the frozen backbone at 224 px and scikit-learn's logistic regression.

Its strength of regularization is chosen on the validation images.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from photographs import MEAN, STD, read_task
from photographs_loop import Images

SIZE = 224


def main() -> None:
    task = read_task()
    plain = v2.Compose(
        [
            v2.Resize(SIZE),
            v2.CenterCrop(SIZE),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    model = task.network(0).eval()
    features, labels = {}, {}
    for split, items in task.images.items():
        loader = DataLoader(Images(items, plain), 32, num_workers=2)
        with torch.no_grad():
            features[split] = np.concatenate([model(images).numpy() for images, _ in loader])
        labels[split] = np.array([label for _, label in items])
    best, best_score = None, -1.0
    for strength in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
        classifier.fit(features["train"], labels["train"])
        score = classifier.score(features["val"], labels["val"])
        if score > best_score:
            best, best_score = classifier, score
    assert best is not None
    task.write([int(k) for k in best.predict(features["test"])], size=SIZE)


if __name__ == "__main__":
    main()
