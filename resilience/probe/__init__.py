"""Beside the core: a client that asks a server for its health, for images without a ``grpc_health_probe``."""
