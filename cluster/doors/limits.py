"""What bounds a connection before there is a request, and a message as a whole."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HttpLimits:
    body_bytes: int = 16 * 1024 * 1024
    body_s: float = 30.0
    """How long a request's body may take to arrive."""
    head_bytes: int = 64 * 1024
    """Of a request's line and headers."""
    head_s: float = 20.0
    """How long a connection may take to send them."""
    write_s: float = 60.0
    """How long a reader may leave a full send buffer alone."""


@dataclass(frozen=True, slots=True)
class GrpcLimits:
    message_bytes: int = 16 * 1024 * 1024
    head_bytes: int = 64 * 1024
    """Of a call's metadata."""
    concurrent_calls: int = 4096
    """Further ones are refused."""
    write_s: float = 60.0
    """How long a reader may leave a full send buffer alone."""
    keepalive_s: float = 30.0
    """How often a silent connection is asked whether its client lives, and within what time."""
