"""Reading, writing and describing checkpoints, whatever made them."""
