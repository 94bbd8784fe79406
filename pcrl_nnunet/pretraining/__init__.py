"""A pretraining: its cases, how it starts, and what watches it."""
