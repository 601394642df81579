"""From a recipe to the first step: asked, checked, built, filled with weights, and timed."""
