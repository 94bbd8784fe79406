"""Transfer of pretrained weights into another plan's network, and readers of foreign checkpoints."""
