"""The trainer under every engine, with every reference and layout: which cells train as one process does.

An engine is added in :data:`ENGINES`; ``pytest tests/trainer/test_matrix.py --run-slow`` runs all cells and writes
docs/devices-matrix.md.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch.distributed as dist
from accelerate import DistributedType, ParallelismConfig, PartialState
from broken_runs import id_rows
from limited_ranks import Outcome, run_limited
from peft import LoraConfig
from ranks import launched
from tiny_models import make_model
from trainer_runs import make_trainer
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from fastdpo.trainer import DPOTrainer

STEPS, PAIRS = 10, 4  # pairs a step, on all processes
VOCABULARY, LAYERS = 97, 3  # odd: shards of 49 and 48 rows
TOLERANCE = 1e-5  # relative, of losses and gradient norms: float32
LIMIT = 60.0  # seconds for a cell
PAGE = Path(__file__).parents[2] / "docs" / "devices-matrix.md"

NEEDS_DEEPSPEED = "needs DeepSpeed: pip install -e '.[deepspeed]'"

Options = dict[str, Any]
Steps = list[dict[str, float]]


@contextlib.contextmanager
def zero_launched(**settings: str) -> Iterator[None]:
    """As on a rank of ``accelerate launch`` with DeepSpeed, of processes on the CPU; see :func:`ranks.launched`."""
    environment = {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_FSDP": "false"}
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    with (
        # Which it would compile, for a minute, to do what gloo does.
        mock.patch.dict(deepspeed.ops.__compatible_ops__, {"deepspeed_shm_comm": False}),
        mock.patch.dict(os.environ, environment | settings),
        mock.patch.object(PartialState, "_prepare_backend", lambda *_: ("gloo", DistributedType.MULTI_GPU)),
    ):
        try:
            yield
        finally:
            gc.collect()
            unset_hf_deepspeed_config()  # or models that are made from here on would be sharded, too


@contextlib.contextmanager
def torchrun_launched() -> Iterator[None]:
    """As on a rank of ``torchrun``; accelerate has meshes for GPUs alone, see :func:`ranks.launched`."""
    with (
        mock.patch.dict(os.environ, {"ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_FSDP": "false"}),
        mock.patch.object(PartialState, "_prepare_backend", lambda *_: ("gloo", DistributedType.MULTI_GPU)),
    ):
        yield


def cut_model(seed: int, make: Callable[[int], Any] | None = None, *, family: str = "llama", **sizes: int) -> Any:
    """What ``make``, by default :func:`small_model`, makes, of which each rank loads a part; by all ranks together."""
    make = functools.partial(small_model, family=family) if make is None else make
    name = getattr(make, "__name__", family)
    folder = Path(tempfile.gettempdir()) / f"matrix-models-{os.getppid()}" / name / str(seed)
    if dist.get_rank() == 0:
        make(seed).save_pretrained(folder)
    dist.barrier()
    config = DistributedConfig(**({"tp_plan": "auto"} if "tp_size" in sizes else {}), **sizes)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", distributed_config=config)


def cp_options(**sizes: int) -> Options:
    return {"parallelism_config": ParallelismConfig(**sizes)}


def zero_config(stage: int, *, offload: bool = False, **zero: Any) -> Options:
    """A DeepSpeed configuration as transformers fills it in; with nothing too small to be sharded."""
    on_cpu = {"device": "cpu", "pin_memory": False}
    optimization: Options = {"stage": stage}
    if stage == 3:
        optimization |= {"stage3_param_persistence_threshold": 0}
    if offload:
        optimization |= {"offload_optimizer": on_cpu} | ({"offload_param": on_cpu} if stage == 3 else {})
    automatic = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {
        **dict.fromkeys((*automatic, "gradient_clipping"), "auto"),
        "bf16": {"enabled": "auto"},
        "zero_optimization": optimization | zero,
    }


def zero_options(stage: int, **more: Any) -> Options:
    return {"use_cpu": False, "bf16": False, "deepspeed": zero_config(stage, **more)}


@dataclass(frozen=True)
class Engine:
    """How a model is trained on several devices.

    Attributes:
        launch: as if a launcher had started the process; on every rank.
        options: of DPOConfig and DPOTrainer, beside those of the cell.
        ranks: how many processes there are.
        data_parallel: among how many of them the pairs are divided.
        kind: what :func:`engine_of` finds once the model is trained.
        models: makes the policy's and the reference's model; by their seeds.
        family: of the models.
    """

    launch: Callable[[], AbstractContextManager[None]]
    kind: str
    options: Options = field(default_factory=dict)
    ranks: int = 2
    data_parallel: int = 2
    models: Callable[[int], Any] = field(default=lambda seed: small_model(seed))
    family: str = "llama"


def mixture_engine(kind: str, *, ranks: int = 2, data_parallel: int = 2, **config: Any) -> Engine:
    """Of a mixture of experts that ``from_pretrained`` spreads over processes."""
    models = functools.partial(cut_model, family="mixtral", **config)
    return Engine(torchrun_launched, kind, {}, ranks, data_parallel, models, "mixtral")


def few_steps(engine: Engine, steps: int) -> Options:
    """A run of ``steps`` times :data:`PAIRS` pairs, in which rounding stays small and everything else is seen."""
    return {
        "train_dataset": id_rows(PAIRS * steps, VOCABULARY),
        "per_device_train_batch_size": PAIRS // engine.data_parallel,
        "per_device_eval_batch_size": PAIRS // engine.data_parallel,
        "max_steps": steps,
        "optim": "adamw_torch",
        "adam_epsilon": 1e-3,  # or it would make as much of rounding as of a gradient, where there is none
        "learning_rate": 0.01,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "linear",
        "gradient_checkpointing": False,
    }


class Cell(NamedTuple):
    engine: str
    reference: str
    layout: str

    @property
    def name(self) -> str:
        return ", ".join(self)


def small_model(seed: int, family: str = "llama", **options: Any) -> Any:
    """Whole in every process, also where a run before it had ZeRO-3, with which models are divided as they are made."""
    unset_hf_deepspeed_config()
    if family == "mixtral":
        options["router_aux_loss_coef"] = 0.0  # a loss of each process's tokens, whose mean is not that of all tokens
    return make_model(family, VOCABULARY, seed=seed, num_hidden_layers=LAYERS, **options)


REFERENCES: dict[str, Callable[[Callable[[int], Any]], Options]] = {
    "second model": lambda models: {"model": models(0), "ref_model": models(1)},
    "adapter": lambda models: {
        "model": models(0),
        "peft_config": LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=4),
    },
    "cache": lambda models: {"model": models(0), "ref_model": models(1), "precompute_ref_log_probs": True},
}
LAYOUTS = {"padded": "padded", "packed": "shared"}

ENGINES: dict[str, Engine] = {
    "DDP": Engine(contextlib.nullcontext, "MULTI_CPU"),
    "FSDP1": Engine(lambda: launched(FSDP_VERSION="1"), "FSDP, version 1"),
    "FSDP2": Engine(launched, "FSDP, version 2"),
    "ZeRO-1": Engine(zero_launched, "DEEPSPEED, stage 1", zero_options(1)),
    "ZeRO-2": Engine(zero_launched, "DEEPSPEED, stage 2", zero_options(2)),
    "ZeRO-3": Engine(zero_launched, "DEEPSPEED, stage 3", zero_options(3)),
    "TP": Engine(torchrun_launched, "MULTI_GPU, tp 2", data_parallel=1, models=lambda seed: cut_model(seed, tp_size=2)),
    "TP x DP": Engine(
        torchrun_launched,
        "MULTI_GPU, dp_shard 2, tp 2",
        ranks=4,
        models=lambda seed: cut_model(seed, tp_size=2, fsdp_size=2),
    ),
    "EP": mixture_engine("MULTI_GPU", fsdp_size=2, ep_size=2),
    "EP x DP": mixture_engine("MULTI_GPU", ranks=4, data_parallel=4, fsdp_size=4, ep_size=2),
    "EP x TP": mixture_engine("MULTI_GPU, tp 2", data_parallel=1, tp_size=2, ep_size=2),
    "CP": Engine(launched, "FSDP, version 2, cp 2", cp_options(cp_size=2), data_parallel=1),
    "CP x DP": Engine(launched, "FSDP, version 2, dp_shard 2, cp 2", cp_options(cp_size=2, dp_shard_size=2), ranks=4),
    "SP": Engine(launched, "FSDP, version 2, cp 2, by heads", cp_options(sp_size=2), data_parallel=1),
    "SP x DP": Engine(
        launched, "FSDP, version 2, dp_shard 2, cp 2, by heads", cp_options(sp_size=2, dp_shard_size=2), ranks=4
    ),
}
ALONE = Engine(contextlib.nullcontext, "NO", ranks=1, data_parallel=1)
CELLS = [Cell(engine, reference, layout) for engine in ENGINES for reference in REFERENCES for layout in LAYOUTS]


def engine_of(trainer: DPOTrainer) -> str:
    """What the model was trained with, as accelerate has it."""
    accelerator = trainer.accelerator
    kind = str(accelerator.distributed_type.value)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        kind += f", stage {trainer.model_wrapped.zero_optimization_stage()}"
    if accelerator.distributed_type == DistributedType.FSDP:
        kind += f", version {accelerator.state.fsdp_plugin.fsdp_version}"
    config = accelerator.parallelism_config
    sizes = {} if config is None else {name: getattr(config, f"{name}_size") for name in ("dp_shard", "cp", "tp")}
    words = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    by_heads = sizes.get("cp", 1) > 1 and config.cp_handler.cp_comm_strategy == "alltoall"
    return ", ".join([kind, *words, *(["by heads"] if by_heads else [])])


def make_cell(cell: Cell, engine: Engine, folder: Path, **more: Any) -> DPOTrainer:
    """The trainer of a cell, where the engine has been launched."""
    options: Options = {
        "train_dataset": id_rows(PAIRS * STEPS, VOCABULARY),
        "per_device_train_batch_size": PAIRS // engine.data_parallel,
        "max_steps": STEPS,
        "max_grad_norm": 0.0,
        "optim": "sgd",  # Adam makes as much of rounding as of a gradient, where there is none
        "learning_rate": 0.003,
        "gradient_checkpointing": False,
        "lr_scheduler_type": "constant",
        "packing": LAYOUTS[cell.layout],
    }
    options |= REFERENCES[cell.reference](engine.models)
    return make_trainer(folder, None, **(options | engine.options | more))


def train_cell(cell: Cell, engine: Engine, folder: Path) -> tuple[str, Steps]:
    """What the model was trained with, and each step's loss and gradient norm."""
    with engine.launch():
        trainer = make_cell(cell, engine, folder)
        trainer.train()
        kind = engine_of(trainer)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return kind, [{name: entry[name] for name in ("loss", "grad_norm")} for entry in log]


def cell_on_rank(name: str, folder: Path) -> tuple[str, Steps] | str:
    """The same of a cell by its name, on a rank; or the message with which it is refused."""
    cell = next(cell for cell in CELLS if cell.name == name)
    try:
        return train_cell(cell, ENGINES[cell.engine], folder / name)
    except NotImplementedError as error:
        return str(error)


def alone(cell: Cell, folder: Path) -> Steps:
    """One process's, to which a cell's are compared: those of all engines of the family have the same."""
    models = functools.partial(small_model, family=ENGINES[cell.engine].family)
    kind, steps = train_cell(cell, replace(ALONE, models=models), folder)
    assert kind == ALONE.kind and len(steps) == STEPS
    return steps


def verdict(cell: Cell, outcomes: list[Outcome], expected: Steps) -> str:
    """The cell's text in the table; anything but these two, where it is wrong: ``equal``, ``refused: …``."""
    errors = [f"{cell.name}, rank {rank}: {o.error}" for rank, o in enumerate(outcomes) if o.error]
    if errors:
        return "\n".join(errors)
    values = [outcome.value for outcome in outcomes]
    if all(isinstance(value, str) for value in values):
        return f"refused: {values[0]}"
    for value in values:
        if isinstance(value, str):
            return f"{cell.name}: refused on some ranks alone: {value}"
        kind, steps = value
        if kind != ENGINES[cell.engine].kind:
            return f"{cell.name}: was trained with {kind}"
        if worst(steps, expected) > TOLERANCE:
            return f"{cell.name}: {worst(steps, expected):.1e} from one process's: {steps}, not {expected}"
    return "equal"


def _as_alone(cell: Cell) -> tuple[str, str, str]:
    return ENGINES[cell.engine].family, cell.reference, cell.layout


def worst(steps: Steps, expected: Steps) -> float:
    """The largest relative difference; infinite where there are more or fewer steps."""
    if len(steps) != len(expected):
        return float("inf")
    return max(
        abs(step[name] - other[name]) / abs(other[name])
        for step, other in zip(steps, expected, strict=True)
        for name in other
    )


def measure(cells: list[Cell], folder: Path) -> dict[Cell, str]:
    """Each cell's text, by running it; cells of engines with as many ranks share their processes."""
    expected = {_as_alone(cell): cell for cell in cells}
    truth = {key: alone(cell, folder / "alone" / cell.name) for key, cell in expected.items()}
    found: dict[Cell, str] = {}
    for ranks in sorted({ENGINES[cell.engine].ranks for cell in cells}):
        some = [cell for cell in cells if ENGINES[cell.engine].ranks == ranks]
        names = [cell.name for cell in some]
        work = functools.partial(cell_on_rank, folder=folder / "runs")
        outcomes = run_limited(work, names, ranks=ranks, limit=LIMIT, folder=folder / str(ranks))
        found |= {cell: verdict(cell, outcomes[cell.name], truth[_as_alone(cell)]) for cell in some}
    return found


# ------------------------------------------------------------------------------------------------------ the page


_TEXT = f"""# Several devices: what trains as one process

{STEPS} steps of a model of {LAYERS} layers on two or four processes of a CPU (gloo), in float32: **equal** where each
step's loss and gradient norm are those of one process, to {TOLERANCE:g} relative; refused where the run stops before
anything is trained, with the message below. `pytest tests/trainer/test_matrix.py --run-slow` runs all of it, a minute
at most for each, and writes this page; some cells are run with every test. The models of EP, whose experts are spread
over processes, are mixtures of 4 experts (Mixtral) with no load-balancing loss, which is of each process's tokens.

"""


def page(found: dict[Cell, str]) -> str:
    columns = [(reference, layout) for reference in REFERENCES for layout in LAYOUTS]
    headings = ["Engine", *(f"{reference}, {layout}" for reference, layout in columns)]
    messages: list[str] = []
    lines = [_row(headings), _row(["---"] * len(headings))]
    for engine in ENGINES:
        cells = [found[Cell(engine, *column)] for column in columns]
        messages += [text for text in dict.fromkeys(cells) if text.startswith("refused: ") and text not in messages]
        lines.append(
            _row([engine, *(text if text == "equal" else f"refused ({messages.index(text) + 1})" for text in cells)])
        )
    notes = [f"{number}. {text.removeprefix('refused: ')}" for number, text in enumerate(messages, 1)]
    return _TEXT + "\n".join(lines) + "\n" + ("\n" + "\n".join(notes) + "\n" if notes else "")


def cells_of(text: str) -> dict[Cell, str]:
    """What the page says of each cell: ``equal``, or ``refused: …``."""
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    headings, rows = rows[0], rows[2:]
    messages = {line.partition(". ")[0]: line.partition(". ")[2] for line in text.splitlines() if line[:1].isdigit()}
    found = {}
    for engine, *cells in rows:
        for heading, said in zip(headings[1:], cells, strict=True):
            reference, _, layout = heading.partition(", ")
            number = said.removeprefix("refused (").removesuffix(")")
            found[Cell(engine, reference, layout)] = said if said == "equal" else f"refused: {messages[number]}"
    return found


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
