"""Fine-tuning: the checks before it, its schedule, and the pretrained weights that it starts from."""
