"""Looking inside a trained network: what its layers do, where it looks, what its stages know.

`subjects.py` opens what is looked at (a run, or a network of torchvision or timm) and the images
it is shown; `layers.py` says which layers there are and records what they give. Everything else
here is a way of looking, on top of these two.
"""
