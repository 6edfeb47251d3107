"""One form of log line in every process: to standard error, a fixed phrase plus key=value."""

from __future__ import annotations

import json
import logging
import os
import re
from typing import TYPE_CHECKING, Any

from engine.errors import unknown_name

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
VARIABLE = "TANDEM_LOG"
FORMS = ("text", "json")
PAIR = re.compile(r"\b(\w+)=%[-+ #0-9.]*[a-zA-Z]")


class JsonLines(logging.Formatter):
    """One object a line; the pairs of the phrase become fields with their own types."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
            **_pairs(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _pairs(record: logging.LogRecord) -> dict[str, Any]:
    """`key=%s` in the phrase names its argument; a phrase with other arguments tells none."""
    phrase = str(record.msg)
    names = PAIR.findall(phrase)
    whole = isinstance(record.args, tuple) and len(names) == len(record.args)
    return dict(zip(names, record.args or (), strict=True)) if whole else {}


def set_up_logging(environment: Mapping[str, str] | None = None) -> None:
    """Text, or JSON lines where TANDEM_LOG=json asks for them."""
    asked = (os.environ if environment is None else environment).get(VARIABLE, FORMS[0])
    if asked not in FORMS:
        raise unknown_name(VARIABLE, asked, FORMS)
    writer = logging.StreamHandler()
    writer.setFormatter(JsonLines() if asked == "json" else logging.Formatter(FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[writer])
