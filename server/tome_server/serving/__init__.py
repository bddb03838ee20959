"""A request between wire and device, and the models in service."""
