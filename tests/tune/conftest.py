"""Makes ``faults`` importable, here and in the worker processes (they get this process's path)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
