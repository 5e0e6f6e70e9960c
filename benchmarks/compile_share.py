"""``sparsek-tune`` with every Triton autotuner cut down to a share of its configs, to have them compiled and cached.

    python benchmarks/compile_share.py SHARE COUNT bench [OPTION]...

An autotuner compiles its configs one after the other. COUNT of these processes, SHARE 0 to COUNT - 1, do it in
parallel; a whole run afterwards finds all of them compiled. Their own results are of no use.
"""

from __future__ import annotations

import sys
from typing import Any

from triton.runtime.autotuner import Autotuner

from sparsek_tune.cli import main


def share(configs: list[Any], number: int, count: int) -> list[Any]:
    """Every count-th config from ``number`` on; the first where that is none, as an autotuner needs one."""
    return configs[number::count] or configs[:1]


if __name__ == "__main__":
    number, count = map(int, sys.argv[1:3])
    whole = Autotuner.prune_configs
    Autotuner.prune_configs = lambda self, kwargs: share(whole(self, kwargs), number, count)  # type: ignore[method-assign]
    main(sys.argv[3:])
