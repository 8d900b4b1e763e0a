"""Generated from proto/resilience/v1; do not edit."""
