"""What of a run's folder goes to the Hub: the model or the adapter, its tokenizer, and its card."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import Future
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress

from fastdpo.data.terms import first_line
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.json_files import read_sealed, write_sealed
from fastdpo.trainer.manifest import MANIFEST_FILE, read_manifest
from fastdpo.trainer.secrets import redacted

logger = logging.getLogger(__name__)

# What a run writes for whoever runs it: samples of the data, paths of the machine, checkpoints of earlier runs.
RUN_RECORDS = (
    "_*",
    f"{PREFIX_CHECKPOINT_DIR}-*",
    "previous-*",
    "report.html",
    "report_start.json",
    ".*",  # what a killed process was writing
    "training.png",
    "data_summary.json",
    "*_results.json",
    "trainer_state.json",
    "training_args.bin",
    MANIFEST_FILE,
)
# What a checkpoint holds beside the model and the tokenizer; a card in it is a form that nobody filled in.
_TRAINING_STATE = ("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state.json", "*.md")


# Some of those that the Hub's client lets through from the client of HTTP beneath it are no OSError.
_UPLOAD_ERRORS: tuple[type[Exception], ...] = (OSError, cast(type[Exception], HfHubHTTPError.__base__))
# In a run's folder: what was uploaded of it at its end, and where to.
PUSHED_FILE = "_pushed.json"


class UploadError(OSError):
    """The Hub could not be reached, or refused; what was to be uploaded is on the disk. The message is one line."""


class HubUploads(Trainer):
    """``transformers.Trainer``, whose uploads take the whole output folder without its checkpoints; these take less."""

    args: DPOConfig
    push_in_progress: PushInProgress | None  # type: ignore[assignment]  # Trainer says None alone

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._told_of: list[Future[Any]] = []
        super().__init__(*args, **kwargs)

    def push_to_hub(  # type: ignore[override]  # Trainer does not say that it may be None
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | None:
        """As ``Trainer``'s; of ``args.output_dir``, without ``fastdpo.trainer.hub.RUN_RECORDS``.

        Raises:
            UploadError: it could not be uploaded.

        Args:
            commit_message, blocking, token, revision, private: as ``Trainer``'s.
            kwargs: for ``create_model_card``.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        kwargs.setdefault("model_name", (self.hub_model_id or str(self.args.folder)).rstrip("/").split("/")[-1])
        tags = kwargs.pop("tags", None)
        given = [tags] if isinstance(tags, str) else list(tags or ())
        self.create_model_card(tags=[*given, *(getattr(self.model, "model_tags", None) or ())], **kwargs)
        self._finish_current_push()
        info: CommitInfo = self._upload(commit_message, token=token, revision=revision, run_as_future=not blocking)
        return info

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._warn_of_failed_pushes()

    def _warn_of_failed_pushes(self) -> None:
        # Trainer asks only whether they are done.
        running: PushInProgress | None = getattr(self, "push_in_progress", None)
        jobs = [] if running is None else cast(list[Future[Any]], running.jobs)
        for job in jobs:
            if job.done() and job not in self._told_of and (error := job.exception()) is not None:
                self._told_of.append(job)
                logger.warning(
                    "An upload to the Hub failed: %s. The run goes on.",
                    redacted(_said(error)),
                )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Called whenever a checkpoint was saved.
        self._warn_of_failed_pushes()
        args, running = self.args, self.push_in_progress
        if running is not None and running.is_done():
            running = None
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if running is not None and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        # Copied, because the checkpoint may be deleted before it is uploaded.
        for path in Path(checkpoint_folder).iterdir():
            if path.is_file() and not _matches(path.name, (*RUN_RECORDS, *_TRAINING_STATE)):
                shutil.copy(path, args.folder)
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [self._upload(message, run_as_future=True)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_one = args.hub_strategy == HubStrategy.CHECKPOINT
            where = {"path_in_repo": "last-checkpoint" if is_one else Path(checkpoint_folder).name}
            jobs.append(
                self._upload(f"{message}, checkpoint", folder_path=checkpoint_folder, ignore_patterns=None, **where)
            )
        before = [] if running is None else cast(list[Any], running.jobs)
        self.push_in_progress = PushInProgress(cast(Any, [*before, *jobs]))  # it says that it takes a single one

    def _upload(self, commit_message: str | None, *, token: str | None = None, **options: Any) -> Any:
        defaults = {"folder_path": self.args.folder, "ignore_patterns": list(RUN_RECORDS), "run_as_future": True}
        options["revision"] = options.get("revision") or self.args.hub_revision
        upload: Any = HfApi().upload_folder
        try:
            return upload(
                repo_id=self.hub_model_id,
                commit_message=commit_message,
                token=token or self.args.hub_token,
                **(defaults | options),
            )
        except _UPLOAD_ERRORS as error:
            raise UploadError(_said(error)) from error


def note_push(args: DPOConfig) -> None:
    """Take note, once the upload at the end of a run is through, of what is on the Hub now."""
    write_sealed(args.folder / PUSHED_FILE, _push_asked(args))


def is_pushed(args: DPOConfig) -> bool:
    """Whether what a finished run left in its folder was uploaded to where it is asked for."""
    return read_sealed(args.folder / PUSHED_FILE) == _push_asked(args)


def _push_asked(args: DPOConfig) -> dict[str, Any]:
    manifest = read_manifest(args.folder)
    files = {} if manifest is None else {name: entry["digests"] for name, entry in manifest.files.items()}
    asked: dict[str, Any] = redacted({"hub_model_id": args.hub_model_id, "hub_revision": args.hub_revision})
    return asked | {"files": files}


def is_run_record(name: str) -> bool:
    """Whether a file or folder of this name in a run's folder is for whoever runs it, and of no use with the model."""
    return _matches(name, RUN_RECORDS)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _said(error: BaseException) -> str:
    return first_line(str(error) or type(error).__name__)
