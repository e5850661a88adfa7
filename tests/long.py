"""Tests that are left for a night: a like test runs each time, and these take long."""

from __future__ import annotations

import os

import pytest

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
only_long = pytest.mark.skipif(not LONG, reason="takes long, and a like test runs; HYPOTHESIS_PROFILE=long runs it")
