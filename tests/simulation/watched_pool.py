"""A block pool that checks itself in full, but only where something was done to it since."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

from engine.blocks import BlockPool

if TYPE_CHECKING:
    from collections.abc import Callable

ONLY_READ = {"hashes", "cached_prefix", "counts", "check"}


class WatchedPool(BlockPool):
    touched = True

    def check(self) -> None:
        if self.touched:
            super().check()
            self.touched = False


def _touching(verb: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(verb)
    def touch(pool: WatchedPool, *args: Any) -> Any:
        pool.touched = True
        return verb(pool, *args)

    return touch


for _name, _verb in list(vars(BlockPool).items()):
    if callable(_verb) and not _name.startswith("__") and _name not in ONLY_READ:
        setattr(WatchedPool, _name, _touching(_verb))
