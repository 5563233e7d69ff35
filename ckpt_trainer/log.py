"""The package's logger. Its lines at INFO are few and meant to be seen, so they are shown unless logging is set up."""

from __future__ import annotations

import logging

logger = logging.getLogger("ckpt_trainer")


class _ShownByDefault(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to stderr while the program has set up no logging of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)


if not logger.handlers:
    logger.setLevel(logging.INFO)
    logger.addHandler(_ShownByDefault())
    logger.handlers[0].setFormatter(logging.Formatter("%(name)s: %(message)s"))
