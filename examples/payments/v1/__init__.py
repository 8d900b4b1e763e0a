"""Generated from proto/examples/payments/v1; do not edit."""
