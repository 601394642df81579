"""The report's fifth script: ResNet-18 on a tiny training set, with augmentation and dropout.

    python experiments/resnet_tiny.py [KEY=VALUE ...] [IMAGE ...]

The first call trains; later calls test the trained model and classify the given images.
"""

from common import experiment

experiment("resnet18-tiny", reported="45 to 50%")
