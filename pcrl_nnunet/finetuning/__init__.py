"""Fine-tuning: its checks, its schedule, and the pretrained weights that it starts from."""
