"""`python -m ckpt_trainer` is `ckpt-trainer`."""

from __future__ import annotations

import sys

from ckpt_trainer.cli import main

sys.exit(main())
