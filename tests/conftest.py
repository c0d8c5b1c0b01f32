"""What tests keep of tokens stays theirs."""

import os
import shutil
import tempfile


def pytest_configure(config):
    config.kept_tokens = os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="fastpref-tests-")


def pytest_unconfigure(config):
    shutil.rmtree(config.kept_tokens, ignore_errors=True)
