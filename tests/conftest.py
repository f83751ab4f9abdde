"""Before any test imports torch: one thread a process. Files run on two processes, and tiny matrices on two threads
lose more to each other than they gain."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
