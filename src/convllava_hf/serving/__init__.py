"""Serving: an API with limits, batches, work over folders, and a page to show."""
