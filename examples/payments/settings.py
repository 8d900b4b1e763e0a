"""What an operator of the demo may set."""

from pydantic import Field

from resilience.settings import Settings


class PaymentsSettings(Settings):
    """The library's settings and the demo's own."""

    http_port: int = Field(8000, ge=0, le=65535, description="The HTTP door's port; 0 picks a free one.")
    grpc_port: int = Field(50051, ge=0, le=65535, description="The gRPC door's port; 0 picks a free one.")
    processing_seconds: float = Field(0.2, ge=0, le=60, description="How long taking a payment lasts.")
    health_drain_seconds: float = Field(0.0, ge=0, le=300, description="From unready to the stop, in seconds.")
