"""A pretraining: its cases, start, steps, monitor and result."""
