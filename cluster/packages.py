"""Which packages are installed, and in which version."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

TANDEM = "tandem-serve"


def package_version(name: str) -> str | None:
    """None where it is not installed, as Tandem itself in a tree that is only on the path."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
