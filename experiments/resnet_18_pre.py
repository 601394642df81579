"""The report's fourth script: ResNet-18 from ImageNet, its last layers trained in four variants.

    python experiments/resnet_18_pre.py [KEY=VALUE ...]

The first call trains; later calls test the trained models. Without internet access use your own
weights: `convlens train pretrain --no-test`, then `model.weights=pretrain`.
"""

from common import arguments

import convlens
from convlens.cli import exit_on_errors
from convlens.errors import UsageError

REPORTED = {
    "last4-adam": "78.29%",
    "last6-adam": "79.57%",
    "last5-sgd-cosine": "81.6%",
    "last5-adam": "88.27%",
}

with exit_on_errors():
    changes, others = arguments()
    if others:
        raise UsageError(f"{others[0]!r} is not an override", fix="write KEY=VALUE")
    table = convlens.train_many("resnet18-pretrained", changes, variants="all")
    for row in table.summaries:
        print(f"{row.variant:<18} test {row.mean:.2%}; the report: {REPORTED[row.variant]}")
    print(f"plot {table.plot}")
