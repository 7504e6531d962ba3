"""Profiles of hypothesis: ``HYPOTHESIS_PROFILE=deep python -m pytest tests/graph/test_fuzz.py`` looks a hundred times longer."""

from __future__ import annotations

import os

from hypothesis import settings

# No deadline: a busy machine is no defect.
settings.register_profile("suite", derandomize=True, deadline=None)
settings.register_profile("deep", max_examples=10_000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))
