"""Trained networks as files for other programs, each proven to answer as convlens does.

`making` is the job, `formats` what there is to export to, `agreement` the proof.
"""
