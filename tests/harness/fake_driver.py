"""The fake driver, which lives in `bench`: the static cost report needs it where no tests are."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:  # pytest puts the tests' folders on the path, not the checkout's
    sys.path.append(ROOT)

from bench.fake_driver import *  # noqa: E402, F403
