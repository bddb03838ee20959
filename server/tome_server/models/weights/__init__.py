"""Reading checkpoints, and bringing weights that were saved elsewhere into the form of timm's models."""
