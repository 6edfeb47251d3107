"""Recurring spans of time, from cron expressions."""

from __future__ import annotations

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from croniter import CroniterError, croniter


def check_cron(cron: str) -> None:
    """Raises ValueError for what is not a five-field expression that ever fires."""
    if len(cron.split()) != 5:
        raise ValueError("must have five fields: minute, hour, day of month, month, day of week")
    try:
        croniter(cron, datetime(2024, 1, 1, tzinfo=ZoneInfo("UTC"))).get_next(datetime)
    except CroniterError as error:
        raise ValueError(f"not a cron expression: {error}") from error


def is_open(cron: str, timezone: str, duration_s: float, wall_s: float) -> bool:
    """Whether less than `duration_s` has passed since the expression last fired."""
    now = datetime.fromtimestamp(wall_s, ZoneInfo(timezone))
    # The latest firing strictly before is asked for, and one at this very second counts.
    fired: datetime = croniter(cron, now + timedelta(seconds=1)).get_prev(datetime)
    return wall_s - fired.timestamp() < duration_s
