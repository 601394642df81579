"""Runs side by side on the same images: which is better, and whether that is more than chance."""
