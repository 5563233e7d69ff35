"""One thread for each process: the models are so small that more cost time. And no test sees another's environment."""

import logging
import os

import pytest

# Before torch is imported, and for processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_OF_ACCELERATE = ("ACCELERATE_", "FSDP_")


@pytest.fixture(autouse=True)
def _environment():
    """transformers 4 leaves bf16, compilers and FSDP of training arguments in the environment, for all that come after."""
    before = dict(os.environ)
    yield
    for name in [name for name in os.environ if name.startswith(_OF_ACCELERATE)]:
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if name.startswith(_OF_ACCELERATE)})


@pytest.fixture(autouse=True)
def _log_level():
    """Tests that train much set the level of our logger."""
    logger = logging.getLogger("ckpt_trainer")
    before = logger.level
    yield
    logger.setLevel(before)
