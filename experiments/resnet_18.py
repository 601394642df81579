"""The report's third script: ResNet-18 on CIFAR-10 from scratch.

    python experiments/resnet_18.py [KEY=VALUE ...] [IMAGE ...]

Trains the first time; run again, it tests the trained model and classifies the images given.
"""

from common import experiment

experiment("resnet18", reported="train 96.33%, test 77.29%")
