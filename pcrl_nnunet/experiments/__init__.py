"""Comparisons of pretraining with training from scratch."""
