"""Inspection of trained networks: activations, features, attribution and measurements by stage.

`inputs` opens the networks and images to inspect and `features` records the outputs of layers; the
other modules build on these two. `look` implements the command `convlens look`.
"""
