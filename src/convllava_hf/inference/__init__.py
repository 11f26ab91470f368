"""Loading a checkpoint and answering with it."""
