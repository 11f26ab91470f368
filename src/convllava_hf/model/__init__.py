"""The hub files: configuration, model, image processor and processor, copied into every checkpoint as remote code."""
