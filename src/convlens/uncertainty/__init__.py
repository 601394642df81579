"""How far a single prediction can be trusted: pure functions on logits and features (NumPy).

`temperature` repairs the confidence, `selective` abstains, `conformal` gives sets of classes, and
`outliers` finds images unlike the training images. `calibration` holds what a model file stores
for all of them.
"""
