"""The report's third script: ResNet-18 on CIFAR-10 from scratch.

    python experiments/resnet_18.py [KEY=VALUE ...] [IMAGE ...]

The first call trains; later calls test the trained model and classify the given images.
"""

from common import experiment

experiment("resnet18", reported="train 96.33%, test 77.29%")
