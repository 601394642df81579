"""Features of the frozen backbone at 224 px and scikit-learn's logistic regression.

The strength of its regularization is chosen on the validation images. It takes the time it takes.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader

from photographs_loop import BATCH, Images, plain_transform
from photographs_task import read_task

SIZE = 224
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def main() -> None:
    task = read_task()
    model = task.network(0).eval()
    features, labels = {}, {}
    for split, items in task.images.items():
        loader = DataLoader(Images(items, plain_transform(SIZE)), BATCH, num_workers=2)
        with torch.no_grad():
            features[split] = np.concatenate([model(images).numpy() for images, _ in loader])
        labels[split] = np.array([label for _, label in items])
    classifiers = [
        make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
        for strength in STRENGTHS
    ]
    for classifier in classifiers:
        classifier.fit(features["train"], labels["train"])
    best = max(classifiers, key=lambda each: each.score(features["val"], labels["val"]))
    task.write([int(k) for k in best.predict(features["test"])], size=SIZE)


if __name__ == "__main__":
    main()
