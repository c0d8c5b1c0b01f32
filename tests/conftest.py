"""What tests keep of tokens stays theirs."""

import os
import shutil
import tempfile

from fastpref import arguments


def pytest_configure(config):
    # The same schedules on every CPU; what a CPU without fast bf16 does, tests ask for by logits_dtype="fp32".
    arguments.SLOW_DTYPES = frozenset()
    config.kept_tokens = os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="fastpref-tests-")


def pytest_unconfigure(config):
    shutil.rmtree(config.kept_tokens, ignore_errors=True)
