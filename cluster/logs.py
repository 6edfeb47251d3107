"""One form of log line in every process: to standard error, a fixed phrase plus key=value."""

from __future__ import annotations

import logging

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def set_up_logging() -> None:
    logging.basicConfig(level=logging.INFO, format=FORMAT)
