"""The gRPC server: services, conversions, access control and health."""
