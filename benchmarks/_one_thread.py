"""Imported first: one thread in this process and in the workers that it starts, and a store that goes with it."""

import multiprocessing
import os
import tempfile

from pipeline.environment import set_defaults

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if multiprocessing.parent_process() is None:  # the workers inherit it
    _home = tempfile.TemporaryDirectory(prefix="coalora-benchmark-")
    os.environ["COALORA_HOME"] = _home.name
set_defaults()
