"""The hub files (configuration, model, pixels, image processor, processor), copied into checkpoints as remote code."""
