from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.engine import tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's tiny checkpoint, made when first asked for."""
    root = tmp_path_factory.mktemp("tiny")

    def directory(name: str) -> Path:
        path = root / name
        if not path.exists():
            tiny.make(name, path)
        return path

    return directory
