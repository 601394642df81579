"""Confident learning: which labels out-of-sample probabilities speak against. Arrays in and out.

Northcutt, Jiang & Chuang 2021, "Confident Learning: Estimating Uncertainty in Dataset Labels"
(JAIR 70, arXiv:1911.00068), as cleanlab computes it. cleanlab takes seconds to import, so it is
imported by the functions that use it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64]  # [N]
Chances = npt.NDArray[np.float64]  # [N, K], rows add up to 1

# cleanlab's default. Over planted errors on digits and MNIST (`benchmarks/labels.py`) its mean F1
# is the highest, 0.90; `both` and `prune_by_class` reach 0.89, `confident_learning` 0.86 (it names
# fewer, nearly all of them wrong), every disagreement 0.81.
FILTER = "prune_by_noise_rate"


@dataclass(frozen=True)
class Verdict:
    """What the probabilities say of N labels.

    `suspected` says which are probably wrong. `scores` rank all, the lowest first: the probability
    of the given label, which ranks planted errors as well as its margin over the best other class
    where models are good, and better where they aren't. `joint[a, b]` estimates how many images
    are labelled a and belong to b; rows add up to the number of images labelled so.
    """

    suspected: npt.NDArray[np.bool_]
    scores: npt.NDArray[np.float64]
    suggested: Labels
    joint: npt.NDArray[np.float64]


def judge(labels: Labels, chances: Chances, *, rule: str = FILTER) -> Verdict:
    """Weighs given labels against probabilities of models that did not train on these images.

    Args:
        labels: the given ones, int64 `[N]`.
        chances: `[N, K]`, rows adding up to 1.
        rule: cleanlab's `filter_by`.
    """
    from cleanlab.count import compute_confident_joint
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_self_confidence_for_each_label

    joint = np.asarray(compute_confident_joint(labels, chances, calibrate=True), np.float64)
    with warnings.catch_warnings():
        # A class without images (a test split may lack one) has no labels to be judged, either.
        warnings.filterwarnings("ignore", "May not flag all label issues in class")
        # One process: by default every core gets one, and so a copy of everything.
        suspected = find_label_issues(labels, chances, filter_by=rule, n_jobs=1)
    suggested = chances.argmax(1).astype(np.int64)
    return Verdict(
        # Rules that go by counts can name an image whose own class is the likeliest.
        suspected=np.asarray(suspected, np.bool_) & (suggested != labels),
        scores=np.asarray(get_self_confidence_for_each_label(labels, chances), np.float64),
        suggested=suggested,
        joint=joint,
    )
