"""LLaVA-format JSON made into datasets for training."""
