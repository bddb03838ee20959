"""What may be set, and how settings are read."""
