"""Pretrained weights into another plan's network, and readers of others' checkpoints."""
