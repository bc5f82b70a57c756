"""The same data, models and seeds through TRL's DPOTrainer and ours: the same losses, gradients and metrics."""

from __future__ import annotations

import math

import pytest
import trl
from tiny_models import make_model
from toy_data import chat_rows, make_tokenizer, text_rows
from trl_runs import (
    BETA,
    COUNTS,
    PAIR_METRICS,
    RTOL,
    TOKEN_METRICS,
    assert_same_gradients,
    assert_same_run,
    reward_atol,
    train,
)

import fastdpo

REWARD_ATOL = reward_atol(300)
# DiscoPOP blends two losses by sigmoid(beta log ratio / 0.05): its slope changes by that many times itself as a log
# ratio changes by 1, and log ratios are such differences.
DISCOPOP_RTOL = RTOL + BETA / 0.05 * REWARD_ATOL


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize(
    ("model_type", "rows"),
    [("llama", text_rows()), ("qwen2", chat_rows()), ("mistral", text_rows()), ("gemma2", chat_rows())],
    ids=["llama", "qwen2", "mistral", "gemma2"],
)
def test_ten_steps_are_trls(tmp_path, tokenizer, model_type, rows):
    model = make_model(model_type, num_hidden_layers=3)
    theirs = train(trl, tmp_path, model, rows, tokenizer)
    ours = train(fastdpo, tmp_path, model, rows, tokenizer)
    assert len(theirs[0]) == len(theirs[1]) == 10
    # The run must have gone somewhere, and not so far that nothing is left to learn, or equality says little.
    assert all(entry["loss"] > 0.05 for entry in theirs[0])
    assert max(abs(entry["rewards/margins"]) for entry in theirs[0]) > 0.1
    assert_same_run(ours, theirs, PAIR_METRICS + COUNTS + TOKEN_METRICS, REWARD_ATOL)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "ipo"},
        {"loss_type": "hinge", "f_divergence_type": "js_divergence"},
        {"loss_type": "aot", "label_smoothing": 0.1},
        {"loss_type": ["apo_zero", "sigmoid_norm"], "loss_weights": [1.0, 0.5], "ld_alpha": 0.4},
        {"loss_type": "robust", "label_smoothing": 0.2, "use_weighting": True},
        {"loss_type": "discopop", "ld_alpha": 0.2, "precompute_ref_log_probs": True},
    ],
    ids=lambda options: "-".join(options["loss_type"]) if isinstance(options["loss_type"], list) else None,
)
def test_other_losses_are_trls(tmp_path, tokenizer, options):
    model = make_model("llama", num_hidden_layers=3)
    options = {"max_steps": 4, **options}
    theirs = train(trl, tmp_path, model, text_rows(), tokenizer, **options)
    ours = train(fastdpo, tmp_path, model, text_rows(), tokenizer, **options)
    rtol = DISCOPOP_RTOL if options["loss_type"] == "discopop" else RTOL
    assert_same_run(ours, theirs, PAIR_METRICS + COUNTS + TOKEN_METRICS, REWARD_ATOL, rtol)


def test_sft_by_the_batch_is_trls(tmp_path, tokenizer):
    model = make_model("llama", num_hidden_layers=3)
    options = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3], "max_steps": 3}
    theirs = train(trl, tmp_path, model, text_rows(), tokenizer, **options)
    ours = train(fastdpo, tmp_path, model, text_rows(), tokenizer, sft_reduction="batch", **options)
    assert_same_run(ours, theirs, PAIR_METRICS + COUNTS + TOKEN_METRICS, REWARD_ATOL)


def test_accumulation_over_even_micro_batches_is_trls(tmp_path, tokenizer):
    model = make_model("llama", num_hidden_layers=3)
    options = {"gradient_accumulation_steps": 2, "max_steps": 4}
    theirs = train(trl, tmp_path, model, text_rows(), tokenizer, **options)
    ours = train(fastdpo, tmp_path, model, text_rows(), tokenizer, **options)
    # TRL's means over tokens are means of the micro-batches' means; ours are over all tokens of the step.
    assert_same_run(ours, theirs, PAIR_METRICS + COUNTS, REWARD_ATOL)


def test_truncated_rows_are_trls(tmp_path, tokenizer):
    model = make_model("llama", num_hidden_layers=3)
    options = {"max_length": 56, "max_steps": 4}
    theirs = train(trl, tmp_path, model, text_rows(), tokenizer, **options)
    ours = train(fastdpo, tmp_path, model, text_rows(), tokenizer, **options)
    assert (
        theirs[0][0]["num_tokens"]
        < train(trl, tmp_path, model, text_rows(), tokenizer, max_steps=1)[0][0]["num_tokens"]
    )
    assert_same_run(ours, theirs, PAIR_METRICS + COUNTS + TOKEN_METRICS, REWARD_ATOL)


def test_load_balancing_loss_is_trls(tmp_path, tokenizer):
    model = make_model("mixtral", num_hidden_layers=3)
    options = {"router_aux_loss_coef": 0.1, "max_steps": 3}
    theirs = train(trl, tmp_path, model, text_rows(), tokenizer, **options)
    ours = train(fastdpo, tmp_path, model, text_rows(), tokenizer, **options)
    assert_same_run(ours, theirs, (*PAIR_METRICS, "aux_loss"), REWARD_ATOL)


def test_where_trl_weighs_uneven_micro_batches_wrongly(tmp_path, tokenizer):
    """Four pairs as three and one: TRL takes the mean of the two means, and so counts the one pair three times."""
    model, rows = make_model("llama", num_hidden_layers=3), text_rows(4)
    # Two steps: the first loss is ln 2 for every pair, however weighted.
    whole = {"per_device_train_batch_size": 4, "max_steps": 2}
    parts = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 2}
    expected = train(trl, tmp_path, model, rows, tokenizer, **whole)
    assert_same_run(
        train(fastdpo, tmp_path, model, rows, tokenizer, **parts), expected, PAIR_METRICS + COUNTS, REWARD_ATOL
    )
    theirs = train(trl, tmp_path, model, rows, tokenizer, **parts)
    with pytest.raises(AssertionError):
        assert_same_gradients(theirs[1][0], expected[1][0], "step 0", RTOL)
    assert theirs[0][1]["loss"] != pytest.approx(expected[0][1]["loss"], rel=RTOL)


def test_where_trl_leaves_dropout_on(tmp_path, tokenizer):
    """Layers that keep their dropout as a number, as Llama's attention does, escape TRL's disable_dropout."""
    model = make_model("llama", attention_dropout=0.3)
    theirs, _ = train(trl, tmp_path, model, text_rows(), tokenizer, max_steps=1)
    ours, _ = train(fastdpo, tmp_path, model, text_rows(), tokenizer, max_steps=1)
    assert theirs[0]["loss"] != pytest.approx(math.log(2), abs=1e-3)
    assert ours[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
