from typing import Any


def render(record: dict[str, Any]) -> str:
    return ""
