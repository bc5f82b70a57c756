"""``python -m fastdpo`` is ``fastdpo``; so is ``accelerate launch -m fastdpo`` on several devices."""

from __future__ import annotations

import sys

from fastdpo.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
