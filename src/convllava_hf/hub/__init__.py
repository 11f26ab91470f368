"""The Hub, and what a checkpoint is and whether it is sound."""
