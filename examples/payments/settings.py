"""What an operator of the demo may set."""

from pydantic import Field

from resilience.settings import Settings


class PaymentsSettings(Settings):
    """The library's settings and the demo's own."""

    http_port: int = Field(8000, ge=0, le=65535, description="The HTTP door's port; 0 picks a free one.")
    grpc_port: int = Field(50051, ge=0, le=65535, description="The gRPC door's port; 0 picks a free one.")
    processing_seconds: float = Field(0.2, ge=0, le=60, description="How long taking a payment lasts.")
    health_port: int | None = Field(None, ge=0, le=65535, description="A port for gRPC probes alone; none if unset.")
    host: str = Field("127.0.0.1", description="The address that all ports listen on.")
