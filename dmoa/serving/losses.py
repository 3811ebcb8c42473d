"""What a call through a Serve handle raises when its replica is lost or out of reach."""

from __future__ import annotations

from grpc import RpcError  # ray[serve] brings it
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

CALL_ERRORS = (RayError, RayServeException, RpcError)
"""Between replicas Serve speaks gRPC, and makes an error of Ray of one of its statuses only, UNAVAILABLE."""
