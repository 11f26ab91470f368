"""Making checkpoints: from the originals' formats, from parts, from deltas and adapters."""
