"""The HTTP face: the Open Inference Protocol's REST side, health and metrics."""
