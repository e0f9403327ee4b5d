"""How long a soak lasts: the one place that reads it. ``make soak MINUTES=60`` sets it.

Tests that try chance again and again do so a few times in the ordinary run, and many times in a soak.
"""

from __future__ import annotations

import os

SOAK_MINUTES = float(os.environ.get("SHMARRAY_SOAK_MINUTES", "0"))  # 0: no soak
