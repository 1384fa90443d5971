"""The log as JSON, one object a line, for programs that collect logs."""

import json
import logging
import traceback
from datetime import UTC, datetime


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object: time, level, logger, message or the record's own fields, traceback."""

    def format(self, record: logging.LogRecord) -> str:
        content: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields = record.__dict__.get("fields")
        content |= fields if isinstance(fields, dict) else {"message": record.getMessage()}
        if record.exc_info:
            content["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(content, ensure_ascii=True)


def log_as_json() -> None:
    """Makes the process's log JSON from now on."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonFormatter())
