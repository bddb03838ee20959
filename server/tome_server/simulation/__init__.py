"""The scheduler on a virtual clock: simulated load, bounds on it, and how many replicas a load takes."""
