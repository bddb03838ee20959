"""The HTTP server: the Open Inference Protocol's REST API, health and metrics."""
