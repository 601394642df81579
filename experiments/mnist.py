"""The report's first script: a plain CNN on MNIST without regularisation. It overfits.

    python experiments/mnist.py [KEY=VALUE ...] [IMAGE ...]

Trains the first time; run again, it tests the trained model and classifies the images given.
"""

from common import experiment

experiment("mnist", reported="train 100%, validation 98%")
