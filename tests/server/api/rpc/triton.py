"""Triton's public client as it is published, in one process with the server's own stubs.

Both define messages of the same names, which protobuf's default pool takes from one of them only; the client's go into
a pool of their own.
"""

from unittest.mock import patch

from google.protobuf import descriptor_pool

_pool = descriptor_pool.DescriptorPool()
with patch.object(descriptor_pool, "Default", lambda: _pool):
    import tritonclient.grpc as client
    import tritonclient.grpc.aio as aio
    from tritonclient.grpc import model_config_pb2, service_pb2
    from tritonclient.utils import InferenceServerException

__all__ = ["InferenceServerException", "aio", "client", "model_config_pb2", "service_pb2"]
