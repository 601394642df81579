"""The report's first script: a plain CNN on MNIST without regularization. It overfits.

    python experiments/mnist.py [KEY=VALUE ...] [IMAGE ...]

The first call trains; later calls test the trained model and classify the given images.
"""

from common import experiment

experiment("mnist", reported="train 100%, validation 98%")
