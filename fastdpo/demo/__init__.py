"""``fastdpo demo``: preference training from beginning to end, on texts whose true reward is known.

The parts can be used by themselves: ``corpus`` (generator and recogniser), ``reward`` (the known reward),
``language_model``, ``sampling``, ``preferences``, ``measures``, and ``stages``, which puts them together.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastdpo.demo.config import DemoConfig, parse_args

__all__ = ["DemoConfig", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: the words after ``fastdpo demo``; ``sys.argv[1:]`` if None.

    Returns:
        The exit code.

    Raises:
        fastdpo.errors.UsageError: the output folder cannot be used.
    """
    try:
        config = parse_args(argv)
    except SystemExit as exit_:  # how argparse ends --help and its own errors
        return int(exit_.code or 0)
    from rich.console import Console  # only now: --help waits for none of this

    from fastdpo.demo.run import run

    run(config, Console())
    return 0
