"""TRL's own tests with our primitive switched on: a pytest plugin, to be run by hand from a checkout of TRL.

    cd trl && PYTHONPATH=/path/to/fastdpo/tests/integrations pytest -p trl_suite_plugin tests/test_dpo_trainer.py

The checkout should be at the tag of the TRL that is installed. Its tests load tiny models and data sets from the hub.
At the end stands how many calls reached our function, and in how many tests; ``--without-fastdpo`` runs TRL as it is.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from fastdpo import logps
from fastdpo.integrations import trl as drop_in


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--without-fastdpo", action="store_true", help="TRL as it is, to compare with")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--without-fastdpo"):
        drop_in.enable()
        config.pluginmanager.register(_Counter())


class _Counter:
    def __init__(self) -> None:
        self.calls = self.tests = 0
        logps.token_logps = self._counted(logps.token_logps)

    def _counted(self, function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return function(*args, **kwargs)

        return wrapper

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Any:
        before = self.calls
        try:
            return (yield)
        finally:
            self.tests += self.calls > before

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(f"fastdpo.token_logps was called {self.calls} times, in {self.tests} tests")
