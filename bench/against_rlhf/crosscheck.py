"""Is our RLOO as good as a public one? It and TRL's RLOO trainer, on the text task with the true reward.

    PYTHONPATH=bench python -m against_rlhf.crosscheck --model FOLDER   one named shared-… in rlhf.py's --work

Both start from the same model and take the same settings; TRL samples by ``model.generate``. Printed are reward and KL
on the held-out prompts after as many completions, and the seconds of CPU time until then. That advantages, loss and
gradient are the same on the same completions is what a test in tests/bench/test_rlhf_arms.py says. TRL 1.16 has no
PPO trainer any more: ours shares rollouts and optimiser with RLOO, and the tests compare it with the definitions.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from against_rlhf.evaluate import evaluate
from against_rlhf.ledger import Ledger
from against_rlhf.optimizer import WARMUP
from against_rlhf.rloo import EACH, train_rloo
from against_rlhf.run import Look, Run, Settings
from against_rlhf.task import Task
from against_rlhf.text import MODEL, load_text_task
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import RLOOConfig, RLOOTrainer

from fastdpo.demo import DemoConfig
from fastdpo.demo.reward import true_reward


class _Looks(TrainerCallback):
    """Looks at the policy after every ``look_every`` batches of completions, off the clock."""

    def __init__(self, ledger: Ledger, look: Look, updates: int, look_every: int) -> None:
        self._ledger, self._look, self._updates, self._every = ledger, look, updates, updates * look_every

    def on_step_end(self, _: Any, state: Any, control: Any, model: Any, **__: Any) -> None:
        if state.global_step % self._every == 0:
            self._ledger.end()
            control.should_training_stop |= self._look(state.global_step // self._updates, model)
            self._ledger.begin("update")


def train_with_trl(run: Run, model: Path, updates: int) -> None:
    """As ``train_rloo`` with the true reward, with TRL's trainer; ``model`` is where the task's model is kept."""
    settings = run.settings
    with tempfile.TemporaryDirectory() as scratch:
        args = RLOOConfig(
            scratch,
            num_generations=EACH,
            per_device_train_batch_size=settings.batch_size // updates,
            steps_per_generation=updates,
            max_steps=settings.steps * updates,
            beta=settings.beta,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=WARMUP,
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
            max_completion_length=run.task.max_new_tokens,
            gradient_checkpointing=False,
            seed=settings.seed,
            bf16=False,
            use_cpu=True,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = RLOOTrainer(
            str(model),
            lambda prompts, completions, **_: [true_reward(text) for text in completions],
            args,
            train_dataset=Dataset.from_dict({"prompt": run.task.prompts}),
            processing_class=run.task.tokenizer,
            callbacks=[_Looks(run.ledger, run.look, updates, settings.look_every)],
        )
        trainer.remove_callback(PrinterCallback)
        with run.ledger.part("update"):  # TRL's parts are not told apart
            trainer.train()


def _printer(name: str, task: Task, settings: Settings, ledger: Ledger) -> Look:
    def look(step: int, policy: Any) -> bool:
        was_training = policy.training
        found = evaluate(task, policy.eval(), seed=settings.seed)
        policy.train(was_training)
        seconds = sum(cost.seconds for cost in ledger.parts.values())
        print(
            f"{name:5} seed {settings.seed}  {step * settings.batch_size:6,} completions  "
            f"reward {found['reward']:5.2f} ± {found['reward_error']:.2f}  "
            f"KL {found['kl']:5.2f} ± {found['kl_error']:.2f}  {seconds:6.1f} s",
            flush=True,
        )
        return False

    return look


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with the text task's model")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--batch_size", type=int, default=128, help="completions of a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--updates", type=int, default=4, help="of a step (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = load_text_task(DemoConfig(), args.model)
    for seed in range(args.seeds):
        settings = Settings(args.learning_rate, args.beta, args.batch_size, args.steps, args.steps // 4, seed)
        ledger = Ledger()
        look = _printer("ours", task, settings, ledger)
        train_rloo(Run(task, [], settings, ledger, look), reward="true", minibatches=args.updates)
        ledger = Ledger()
        look = _printer("trl", task, settings, ledger)
        train_with_trl(Run(task, [], settings, ledger, look), args.model / MODEL, args.updates)


if __name__ == "__main__":
    main()
