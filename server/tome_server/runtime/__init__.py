"""Runs batches on a device, and measures what a model is worth there."""
