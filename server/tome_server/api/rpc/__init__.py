"""The gRPC face: servicer, conversions, the status contract, health."""
