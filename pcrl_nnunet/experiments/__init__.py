"""The comparison of pretraining with training from scratch: arms, split, jobs, scores and verdict."""
