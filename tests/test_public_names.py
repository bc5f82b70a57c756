"""What people import, call and run by name: it is there, is what it was, and works as the name says."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pickle
import re
import runpy
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdpo

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastdpo"

CLASSES = {
    "fastdpo": "DPOConfig DPOLoss DPOOutput DPOTrainer LossOptions LowRankUpdate TokenLogps",
    "fastdpo.logps": "LowRankUpdate TokenLogps",
    "fastdpo.loss": "DPOLoss DPOOutput LossOptions",
    "fastdpo.data": "DataError DataSummary PreferenceCollator VisionCollator",
    "fastdpo.model": "FusedHead HeadOutput",
    "fastdpo.ref_cache": "RefCache RefCacheError",
    "fastdpo.trainer": "DPOConfig DPOTrainer",
    "fastdpo.errors": "InputError UsageError",
    "fastdpo.integrations.liger": "FusedLinearDPOLoss LigerFusedLinearDPOLoss",
    "fastdpo.integrations.torchtune": "DPOLoss RSOLoss",
}
FUNCTIONS = {
    "fastdpo": "build_info dpo_loss preference_loss sum_over_group token_logps",
    "fastdpo.logps": "build_info token_logps",
    "fastdpo.logps.oracle": "logits token_logps",
    "fastdpo.loss": "dpo_loss preference_loss sum_over_group",
    "fastdpo.data": "examine load_preferences prepare",
    "fastdpo.report": "draw_training",
    "fastdpo.commands.cli": "main",
    "fastdpo.integrations.dpo_authors": "_get_batch_logps batch_logps preference_loss",
    "fastdpo.integrations.trl": "disable enable enabled",
}
CONSTANTS = {
    "fastdpo": "__version__",
    "fastdpo.logps": "DEFAULT_RETAIN_BYTES OUTPUTS",
    "fastdpo.data": "REFERENCE_COLUMNS TOKEN_COLUMNS TRUNCATION_MODES",
}
MODULES = {"fastdpo": "data integrations logps loss model ref_cache report trainer"}
COMMANDS = ("train", "check-data", "cache-ref", "eval", "compare", "chat", "demo", "info")
BENCHMARKS = ("run", "train", "rlhf", "data", "outputs", "cuda_blocks")


def listed(names: dict[str, str]) -> list[tuple[str, str]]:
    return [(module, name) for module, text in names.items() for name in text.split()]


# ---------------------------------------------------------------------------------------------------- what is imported


@pytest.mark.parametrize(
    ("names", "is_kind"),
    [
        (CLASSES, inspect.isclass),
        (FUNCTIONS, inspect.isfunction),
        (MODULES, inspect.ismodule),
        (CONSTANTS, lambda value: isinstance(value, str | int | tuple | dict)),
    ],
    ids=["classes", "functions", "modules", "constants"],
)
def test_names_are_what_they_were(names: dict[str, str], is_kind: Any) -> None:
    for module, name in listed(names):
        assert is_kind(getattr(importlib.import_module(module), name)), f"{module}.{name}"


def test_a_name_is_one_thing_wherever_it_is_imported_from() -> None:
    for name in set(dir(fastdpo.loss)) & set(dir(fastdpo)):
        assert getattr(fastdpo.loss, name) is getattr(fastdpo, name)
    for name in set(dir(fastdpo.logps)) & set(dir(fastdpo)):
        assert getattr(fastdpo.logps, name) is getattr(fastdpo, name)
    assert fastdpo.DPOTrainer is fastdpo.trainer.DPOTrainer
    assert issubclass(fastdpo.DPOLoss, nn.Module)
    assert fastdpo.__version__ == version("fastdpo")


def stubs() -> list[Path]:
    return sorted(PACKAGE.rglob("__init__.pyi"))


@pytest.mark.parametrize("stub", stubs(), ids=lambda stub: stub.parent.name)
def test_a_stub_says_what_can_be_imported(stub: Path) -> None:
    """And nothing else can: lazy_loader makes the package's names from it."""
    package = importlib.import_module(".".join(stub.parent.relative_to(ROOT).parts))
    sources: dict[str, str] = {}
    modules: set[str] = set()
    for statement in ast.parse(stub.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.AnnAssign):  # __version__: str
            assert type(getattr(package, ast.unparse(statement.target))).__name__ == ast.unparse(statement.annotation)
            continue
        assert isinstance(statement, ast.ImportFrom) and statement.level == 1
        for alias in statement.names:
            assert alias.asname == alias.name  # how a stub says that it hands a name on
            sources[alias.name] = statement.module or alias.name
            modules |= {alias.name} if statement.module is None else set()
            source = importlib.import_module(f"{package.__name__}.{sources[alias.name]}")
            expected = source if statement.module is None else getattr(source, alias.name)
            assert getattr(package, alias.name) is expected, alias.name
    assert set(package.__all__) == sources.keys()
    # Importing a module puts it into its package, where it would hide what has its name.
    assert not {path.stem for path in stub.parent.iterdir()} & (sources.keys() - modules)


def test_every_package_with_names_has_a_stub() -> None:
    for init in PACKAGE.rglob("__init__.py"):
        assert ("lazy_loader" in init.read_text(encoding="utf-8")) == init.with_suffix(".pyi").is_file(), init


# --------------------------------------------------------------------------------------------------- what names can do


def test_results_and_options_are_pickled(tmp_path: Path) -> None:
    options = fastdpo.LossOptions(beta=0.2, loss_type=("sigmoid", "sft"), loss_weights=(1.0, 0.5))
    assert pickle.loads(pickle.dumps(options)) == options

    output = fastdpo.dpo_loss(torch.randn(4, 3, 8), torch.randn(11, 8), torch.randint(0, 11, (4, 3)))
    found = pickle.loads(pickle.dumps(output))
    assert type(found) is fastdpo.DPOOutput
    for name in ("loss", "losses", "chosen_logps", "rejected_rewards", "chosen_tokens"):
        assert torch.equal(getattr(found, name), getattr(output, name)), name

    config = fastdpo.DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, beta=0.3, loss_type="ipo")
    found = pickle.loads(pickle.dumps(config))
    assert type(found) is fastdpo.DPOConfig and found.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "call",
    [
        lambda *tensors: fastdpo.dpo_loss(*tensors).loss,
        lambda *tensors: fastdpo.loss.dpo_loss(*tensors).loss,
        lambda *tensors: fastdpo.logps.token_logps(*tensors).logps,
    ],
    ids=["fastdpo.dpo_loss", "fastdpo.loss.dpo_loss", "fastdpo.logps.token_logps"],
)
def test_names_are_found_in_a_compiled_graph(call: Any) -> None:
    tensors: list[Tensor] = [torch.randn(4, 3, 8), torch.randn(11, 8), torch.randint(0, 11, (4, 3))]
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors), call(*tensors))


# ---------------------------------------------------------------------------------------------------------- what is run


def test_the_command_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    (script,) = entry_points(group="console_scripts", name="fastdpo")
    assert script.load()(["--help"]) == 0
    said = capsys.readouterr().out
    assert set(COMMANDS) <= set(re.findall(r"^    ([a-z-]+)(?:  |$)", said, re.M))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    from fastdpo.commands.cli import main

    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"fastdpo {command}" in said and "--help" in said


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_every_benchmark_helps(
    benchmark: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{benchmark}.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "bench" / f"{benchmark}.py"), run_name="__main__")
    assert not stopped.value.code
    assert f"usage: {benchmark}.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([sys.executable, "-m", "fastdpo", "--help"], "usage: fastdpo"),
        ([sys.executable, str(ROOT / "bench/run.py"), "--help"], "usage: run.py"),
        (["bash", str(ROOT / "bench/gpu.sh"), "--help"], "bench/gpu.sh check"),
    ],
    ids=["-m fastdpo", "run.py", "gpu.sh"],
)
def test_runs_as_a_process_in_any_folder(command: list[str], words: str, tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout
