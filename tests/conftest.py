"""Settings of all tests."""

import os

# Tests share few cores: threads that wait must not spin, and small tensors need one thread.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
