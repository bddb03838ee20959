"""A gRPC model server that turns a request's deadline into a token-merging ratio."""
