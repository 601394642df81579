"""The report's fifth script: ResNet-18 on a tiny training set, with augmentation and dropout.

    python experiments/resnet_tiny.py [KEY=VALUE ...] [IMAGE ...]

Trains the first time; run again, it tests the trained model and classifies the images given.
"""

from common import experiment

experiment("resnet18-tiny", reported="45 to 50%")
