"""One thread for each process: the models are so small that more of them cost time."""

import os

# Before torch is imported, and for processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
