"""Export of trained networks for other programs, checked numerically against convlens.

`making` is the job, `formats` the table of formats, `agreement` the numerical check.
"""
