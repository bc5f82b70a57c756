"""The demo: its language and reward, its samples and their KL, its labels, and a whole run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import subprocess
import sys
import warnings
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fastdpo.demo import DemoConfig, main
from fastdpo.demo.config import QUICK, parse_args
from fastdpo.demo.corpus import domain_of, draw_prompts, is_grammatical, write_corpus
from fastdpo.demo.folder import OutputFolder
from fastdpo.demo.grammar import Grammar
from fastdpo.demo.language_model import build_model, encode_completions, perplexity, pretrain, train_tokenizer
from fastdpo.demo.measures import Mean, distinct_n
from fastdpo.demo.preferences import label_pairs, prefers_first
from fastdpo.demo.reward import LOWEST_REWARD, reward_parts, true_reward
from fastdpo.demo.sampling import (
    Completion,
    TokenSamples,
    completion_log_probs,
    decode,
    sample_batches,
    sample_tokens,
    sequence_kl,
)
from fastdpo.demo.vocabulary import ANYTHING, DOMAINS, GROUPS, OPINION_WEIGHTS, WHOLE
from fastdpo.errors import UsageError

FILM = "Review of the film Blue Harbour:"
# The probability with which a statistical check here may fail although all is well.
FAILURE = 1e-6


# --------------------------------------------------------------------------------------------------------------------
# The language
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus():
    return write_corpus(300, random.Random(1))


def test_grammar_accepts_exactly_what_it_writes():
    grammar = Grammar({"s": {"{x±}{x±}.": 1.0}, "x+": {"a": 1.0, "ab": 1.0}, "x-": {"b": 1.0}})
    # Written out: no draw comes into it. "ab" has two readings, and "abb" one that a greedy reader misses.
    language = {x + y + "." for x in ("a", "ab", "b") for y in ("a", "ab", "b")}
    candidates = {"".join(letters) + "." for n in range(6) for letters in product("ab", repeat=n)}
    assert {text for text in candidates if grammar.accepts("s", text)} == language
    assert {grammar.sample("s", random.Random(i), mood=1.0) for i in range(99)} == {"aa.", "aab.", "aba.", "abab."}


def test_grammar_refuses_a_symbol_without_a_rule():
    with pytest.raises(ValueError, match="symbols without a rule: .'y'"):
        Grammar({"s": {"{y}": 1.0}})


def test_generated_reviews_are_accepted(corpus):
    assert all(is_grammatical(review.prompt, review.text) for review in corpus)
    assert all(is_grammatical(review.prompt, review.text, sensible=True) for review in corpus)
    assert {domain_of(review.prompt) for review in corpus} == set(DOMAINS)
    assert len({review.text for review in corpus}) > 290


def test_corrupted_reviews_are_rejected(corpus):
    rng = random.Random(2)
    for review in corpus:
        words = review.text.split(" ")[1:]
        place = rng.randrange(len(words))
        doubled = words[: place + 1] + words[place:]
        backwards = words[::-1]
        for text in (
            " " + " ".join(doubled),
            " " + " ".join(backwards),
            review.text[:-1],
            review.text.lower(),
            review.text.strip(),
            review.text + " ",
            review.text + review.text,
        ):
            assert not is_grammatical(review.prompt, text), text


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        (" The plot was slow, while the songs were haunting.", True),
        (" The plot were slow, while the songs were haunting.", False),  # number
        (" The plot was tasty.", False),  # no plot is
        (" The soup was tasty.", False),  # not in a film
        (" You get a elegant dialogue.", False),
        (" The plot was very superb.", False),  # beyond degree
        (" The plot was slow. The plot was dull.", False),  # said twice
        (" The plot was slow. The songs were slow.", False),
        ("", False),
    ],
)
def test_recogniser_on_sentences_by_hand(text, accepted):
    assert is_grammatical(FILM, text) is accepted
    assert is_grammatical(FILM, text, sensible=True) is accepted


def test_what_is_grammatical_need_not_be_sensible():
    text = " The plot was haunting, and the songs were predictable."
    assert is_grammatical(FILM, text)
    assert not is_grammatical(FILM, text, sensible=True)


def test_prompts_are_distinct_and_exclude():
    held_out = draw_prompts(200, random.Random(3))
    others = draw_prompts(200, random.Random(3), exclude=held_out)
    assert len(set(held_out)) == 200 and not set(held_out) & set(others)
    reviews = write_corpus(200, random.Random(3), exclude=held_out)
    assert not set(held_out) & {review.prompt for review in reviews}
    with pytest.raises(ValueError, match="not a prompt"):
        domain_of("Once upon a time")


# --------------------------------------------------------------------------------------------------------------------
# The reward
# --------------------------------------------------------------------------------------------------------------------


def test_opinion_words_of_the_grammar_have_their_sign():
    for group in (ANYTHING, WHOLE, *GROUPS.values()):
        assert all(OPINION_WEIGHTS[word] > 0 for word in group.good)
        assert all(OPINION_WEIGHTS[word] < 0 for word in group.bad)


@pytest.mark.parametrize(
    "better_first",
    [
        ("I saw it last week. The plot was good.", "I saw it last week. The plot was bad."),
        ("I saw it last week. The plot was very good.", "I saw it last week. The plot was good."),
        ("I saw it last week. The plot was bad.", "I saw it last week. The plot was very bad."),
        ("I saw it last week. The plot was good.", "I saw it last week. The plot was not good."),
        ("I saw it last week. The plot was not bad.", "I saw it last week. The plot was bad."),
        ("I saw it last week. The plot was good.", "I saw it last week. The plot was not bad."),
        ("I saw it last week. The plot was far from dull.", "I saw it last week. The plot was dull."),
        ("I did not hate the music. I loved the plot.", "I did not like the music. I hated the plot."),
        ("I do not regret it. It was worth the money.", "I regret it. It was not worth the money."),
        ("It wasn't bad, but the plot was good.", "It wasn't good, but the plot was bad."),
        ("The plot was superb, and the music was warm.", "The plot was nice, and the music was warm."),
    ],
)
def test_reward_orders_by_sentiment(better_first):
    better, worse = better_first
    assert true_reward(better) > true_reward(worse)


@pytest.mark.parametrize(
    ("text", "sign"),
    [
        ("The plot was not very good.", -1),
        ("The plot was never dull.", 1),
        ("The plot was not dull, and the music was great.", 1),
        ("The plot was not great, and the music was dull.", -1),
        ("I saw it last week with two friends.", 0),
    ],
)
def test_sentiment_sign(text, sign):
    assert math.copysign(bool(reward_parts(text).sentiment), reward_parts(text).sentiment) == sign


def test_negation_does_not_cross_a_clause():
    assert reward_parts("It was not dull, good.").sentiment > reward_parts("It was not dull.").sentiment


FLUENT = "I saw it last week. The plot was gripping, and the music was lovely. I recommend it to everyone."


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n ",
        "?!.",
        "12345",
        "great",
        "great " * 40,
        "The plot was great. " * 8,
        "superb wonderful great good nice lovely gripping clever",
        "asdf qwer zxcv uiop hjkl vbnm",
        FLUENT[:-1],
        FLUENT.lower(),
        FLUENT.replace("the", "the the"),
        FLUENT.replace("gripping", "grrripping"),
        FLUENT[::-1],
        "\x00\ud7ff🙂",
    ],
)
def test_reward_of_what_is_not_language_is_low(text):
    """Each is below the plain truth told badly: a fluent text gains from being one, not from its words alone."""
    assert LOWEST_REWARD <= true_reward(text) < true_reward(FLUENT) - 1


def test_faults_are_never_a_gain(corpus):
    parts = [reward_parts(review.text) for review in corpus]
    assert min(part.faults for part in parts) >= 0
    # Of the corpus itself hardly anything is taken off: the reward is about its sentiment.
    assert sum(part.faults for part in parts) / len(parts) < 0.1


# --------------------------------------------------------------------------------------------------------------------
# Labels and measures
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("difference", [-2.0, 0.0, 0.5, 3.0])
def test_labels_follow_bradley_and_terry(difference):
    draws, rng = 5000, random.Random(4)
    wins = sum(prefers_first(1.0 + difference, 1.0, rng) for _ in range(draws))
    # Hoeffding: P(|mean - p| >= t) <= 2 exp(-2 n t^2).
    bound = math.sqrt(math.log(2 / FAILURE) / (2 * draws))
    assert abs(wins / draws - 1 / (1 + math.exp(-difference))) < bound


def test_pairs_are_labelled_and_the_useless_left_out():
    good, bad = " The plot was great.", " The plot was poor."
    first = [Completion(FILM, good, True), Completion(FILM, bad, True), Completion(FILM, good, False)]
    second = [Completion(FILM, bad, True), Completion(FILM, bad, True), Completion(FILM, bad, True)]
    (pair,) = label_pairs(first, second, rng=None)
    assert (pair.chosen, pair.rejected) == (good, bad)
    assert (pair.chosen_reward, pair.rejected_reward) == (true_reward(good), true_reward(bad))

    labels = [label_pairs(first[:1], second[:1], random.Random(seed))[0] for seed in range(200)]
    assert {label.chosen for label in labels} == {good, bad}
    assert all((label.chosen_reward > label.rejected_reward) == label.is_right for label in labels)
    assert labels == [label_pairs(first[:1], second[:1], random.Random(seed))[0] for seed in range(200)]


def test_mean_and_distinct_n():
    assert Mean.of([1.0, 3.0]) == Mean(2.0, math.sqrt(2), 1.0)
    assert distinct_n(["a b a", "A b"], 1) == 2 / 5
    assert distinct_n(["a b a", "A b"], 2) == 2 / 3
    assert distinct_n(["a"], 2) == 0.0


# --------------------------------------------------------------------------------------------------------------------
# The language model
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer((review.prompt + review.text for review in corpus), vocab_size=700)


def test_tokenizer_gives_texts_back_and_parts_prompt_from_completion(tokenizer, corpus):
    texts = [review.text for review in corpus] + [" naïve 🙂\n\ttext"]
    prompts = [review.prompt for review in corpus] + [FILM]
    for (prompt, completion), text, whole in zip(
        encode_completions(tokenizer, prompts, texts),
        texts,
        map("".join, zip(prompts, texts, strict=True)),
        strict=True,
    ):
        assert tokenizer.decode(completion, skip_special_tokens=True) == text
        assert completion[-1] == tokenizer.eos_token_id
        assert tokenizer(whole)["input_ids"] == prompt + completion[:-1]


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary(tokenizer, corpus):
    model = build_model(tokenizer, hidden_size=64, layers=1, seed=0)
    model.get_input_embeddings().weight.data.zero_()
    prompts, texts = [review.prompt for review in corpus[:20]], [review.text for review in corpus[:20]]
    assert perplexity(model, tokenizer, prompts, texts, batch_size=7) == pytest.approx(len(tokenizer), rel=1e-5)


def test_pretraining_learns_and_is_repeatable(tokenizer, corpus):
    losses = []
    for _ in range(2):
        model = build_model(tokenizer, hidden_size=64, layers=1, seed=0)
        losses.append(
            pretrain(model, tokenizer, corpus, steps=20, batch_size=8, learning_rate=1e-2, rng=random.Random(5))
        )
    assert losses[0] == losses[1]
    assert abs(losses[0][0] - math.log(len(tokenizer))) < 1.5
    assert losses[0][-1] < losses[0][0] - 1.5


# --------------------------------------------------------------------------------------------------------------------
# Sampling and KL, against all texts of a language of three letters
# --------------------------------------------------------------------------------------------------------------------

PAD, END, LETTERS, LONGEST = 0, 1, 4, 3


def tiny_model(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=LETTERS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config).eval()


def prompt_batch(*prompts):
    """Prompts of any lengths as (ids, mask), padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


class CalledByTheOlderName(LlamaForCausalLM):
    """As before transformers 5.24, where ``past_key_values`` is the only name of the cache."""

    def forward(self, input_ids, past_key_values=None, **kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return super().forward(input_ids, past_key_values=past_key_values, **kwargs)


def test_the_cache_is_named_as_the_model_names_it():
    model = tiny_model(0)
    older = CalledByTheOlderName(model.config).eval()
    older.load_state_dict(model.state_dict())
    ids, mask = prompt_batch([2, 3], [3])

    def draw(from_model):
        generator = torch.Generator().manual_seed(0)
        return sample_tokens(from_model, ids, mask, end_id=-1, pad_id=PAD, max_new_tokens=8, generator=generator)

    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        new, old = draw(model), draw(older)
    assert new.tokens.shape[1] == 8  # no token ends them: all but the first come from the cache
    assert torch.equal(new.tokens, old.tokens) and torch.equal(new.logps, old.logps)


def all_completions():
    """Every completion: END at the end, or cut at LONGEST tokens."""
    others = [token for token in range(LETTERS) if token != END]
    ended = [(*body, END) for n in range(LONGEST) for body in product(others, repeat=n)]
    return ended + list(product(others, repeat=LONGEST))


@torch.no_grad()
def exact_log_prob(model, prompt, completion, temperature=1.0):
    """Straight from the definition: no padding, no cache, one sequence."""
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0].double() / temperature
    log_probs = logits.log_softmax(-1)
    return sum(log_probs[len(prompt) - 1 + place, token].item() for place, token in enumerate(completion))


def as_samples(prompt, completions):
    ids, mask = prompt_batch(*[prompt] * len(completions))
    tokens = torch.tensor([[*text, *[PAD] * (LONGEST - len(text))] for text in completions])
    lengths = torch.tensor([len(text) for text in completions])
    return TokenSamples(
        prompt_ids=ids,
        prompt_mask=mask,
        tokens=tokens,
        mask=torch.arange(LONGEST) < lengths[:, None],
        logps=torch.zeros(tokens.shape),
        ended=(tokens == END).any(1),
    )


def draw(model, prompts, seed=0, longest=LONGEST, temperature=1.0):
    ids, mask = prompt_batch(*prompts)
    generator = torch.Generator().manual_seed(seed)
    return sample_tokens(
        model,
        ids,
        mask,
        end_id=END,
        pad_id=PAD,
        max_new_tokens=longest,
        generator=generator,
        temperature=temperature,
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_follow_the_model(temperature):
    model, prompts, each = tiny_model(6), ([2, 3, 3], [3]), 6000
    samples = draw(model, [prompt for prompt in prompts for _ in range(each)], temperature=temperature)
    texts = [tuple(row[keep].tolist()) for row, keep in zip(samples.tokens, samples.mask, strict=True)]
    outcomes = all_completions()
    # Bretagnolle, Huber and Carol: P(|frequencies - p|_1 >= t) <= 2^K exp(-n t^2 / 2), for K outcomes.
    bound = math.sqrt(2 * (len(outcomes) * math.log(2) + math.log(1 / FAILURE)) / each)
    for place, prompt in enumerate(prompts):
        drawn = texts[place * each : (place + 1) * each]
        exact = {text: math.exp(exact_log_prob(model, prompt, text, temperature)) for text in outcomes}
        assert sum(exact.values()) == pytest.approx(1, abs=1e-5)
        assert sum(abs(drawn.count(text) / each - exact[text]) for text in outcomes) < bound


def test_samples_stop_at_the_end_token_and_are_masked_behind_it():
    prompts = [[2] * (1 + row % 4) for row in range(300)]
    samples = draw(tiny_model(7), prompts, longest=24)
    lengths = samples.mask.sum(1)
    assert samples.ended.any() and lengths.min() < lengths.max() == samples.tokens.shape[1]
    for tokens, mask, logps, ended in zip(samples.tokens, samples.mask, samples.logps, samples.ended, strict=True):
        length = int(mask.sum())
        assert mask[:length].all() and (tokens[length:] == PAD).all() and (logps[length:] == 0).all()
        assert END not in tokens[: length - 1]
        assert (tokens[length - 1] == END) == ended
        assert ended or length == 24


def test_log_probabilities_while_sampling_and_afterwards_are_the_model_s():
    """Padding on the left, the cache, and rows dropped from it leave no trace."""
    model, prompts = tiny_model(7), [[2, 3] * (1 + row % 3) for row in range(60)]
    samples = draw(model, prompts, longest=12)
    with torch.no_grad():
        again = completion_log_probs(model, samples).gather(2, samples.tokens[..., None])[..., 0] * samples.mask
    torch.testing.assert_close(samples.logps, again, atol=1e-5, rtol=1e-5)
    for row, prompt in enumerate(prompts):
        text = samples.tokens[row][samples.mask[row]].tolist()
        assert samples.logps[row].sum().item() == pytest.approx(exact_log_prob(model, prompt, text), abs=1e-4)


def test_decoded_samples(tokenizer):
    model = build_model(tokenizer, hidden_size=64, layers=1, seed=0)
    prompts = draw_prompts(10, random.Random(8))
    counts = []
    batches = sample_batches(
        model,
        tokenizer,
        prompts,
        max_new_tokens=5,
        generator=torch.Generator().manual_seed(0),
        batch_size=4,
        on_batch=counts.append,
    )
    completions = decode(tokenizer, prompts, batches)
    assert counts == [4, 4, 2]
    assert [completion.prompt for completion in completions] == prompts
    assert not any("<|" in completion.text for completion in completions)
    assert [completion.ended for completion in completions] == [
        flag.item() for batch in batches for flag in batch.ended
    ]


def test_sequence_kl_of_a_model_from_itself_is_zero():
    model = tiny_model(9)
    assert (sequence_kl(model, model, draw(model, [[2], [3, 3]] * 8)) == 0).all()


@pytest.mark.parametrize("prompt", [[2], [3, 2, 2]])
def test_sequence_kl_is_unbiased(prompt):
    """Its expectation over all texts is the divergence by definition."""
    policy, reference = tiny_model(10), tiny_model(11)
    texts = all_completions()
    ours = [exact_log_prob(policy, prompt, text) for text in texts]
    theirs = [exact_log_prob(reference, prompt, text) for text in texts]
    exact = sum(math.exp(p) * (p - q) for p, q in zip(ours, theirs, strict=True))
    estimates = sequence_kl(policy, reference, as_samples(prompt, texts)).tolist()
    expected = sum(math.exp(p) * estimate for p, estimate in zip(ours, estimates, strict=True))
    assert exact > 0.1
    assert expected == pytest.approx(exact, rel=1e-4)


# --------------------------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------------------------


def test_folder_replaces_what_a_demo_wrote_and_nothing_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    folder = OutputFolder(tmp_path)
    assert folder.clear_earlier_demo() == 0
    folder.file("summary.json").write_text("{}")
    (tmp_path / "base_model").mkdir()
    (tmp_path / "base_model" / "config.json").write_text("{}")
    folder.note_contents("base_model")
    with pytest.raises(UsageError, match="in the way"):
        folder.file("notes.txt")

    again = OutputFolder(tmp_path)
    with pytest.raises(UsageError, match="base_model is in the way"):
        again.check_free("base_model")
    assert again.clear_earlier_demo() == 2
    again.check_free("base_model", "summary.json")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(UsageError, match="is a file"):
        OutputFolder(tmp_path / "notes.txt")


def test_a_listing_cannot_reach_out_of_the_folder(tmp_path):
    outside, inside = tmp_path / "precious.txt", tmp_path / "out"
    outside.write_text("mine")
    inside.mkdir()
    (inside / "demo-files.json").write_text(json.dumps({"files": ["../precious.txt", str(outside)]}))
    assert OutputFolder(inside).clear_earlier_demo() == 0
    assert outside.exists()


def test_flags(capsys):
    assert parse_args([]) == DemoConfig()
    assert parse_args(["--quick"]) == dataclasses.replace(DemoConfig(), **QUICK)
    assert parse_args(["--quick", "--steps", "7", "--output_dir", "x"]).steps == 7
    assert main(["--help"]) == 0
    help_ = capsys.readouterr().out
    assert all(f"--{setting.name}" in help_ for setting in dataclasses.fields(DemoConfig))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--beta", "0"], "--beta is 0.0; it should be above 0"),
        (["--beta", "nan"], "--beta is nan; it should be above 0"),
        (["--steps", "0"], "--steps is 0; it should be at least 1"),
        (["--hidden_size", "100"], "multiple of 64"),
        (["--no_such_flag"], "unrecognized arguments"),
    ],
)
def test_bad_flags_are_refused(argv, message, capsys):
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_the_whole_demo(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    done = subprocess.run(
        [sys.executable, "-m", "fastdpo", "demo", "--quick", "--output_dir", str(out)],
        env=os.environ | {"COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for file in ("training.png", "rewards.png", "pairs.jsonl", "samples.jsonl", "demo-files.json"):
        assert (out / file).stat().st_size > 0
    assert (out / "notes.txt").read_text() == "mine"

    summary = json.loads((out / "summary.json").read_text())
    assert {"true_reward_before", "true_reward_after", "kl", "preference_accuracy", "seconds"} <= summary.keys()
    error = math.hypot(summary["true_reward_before_se"], summary["true_reward_after_se"])
    assert summary["true_reward_after"] - summary["true_reward_before"] > 3 * error
    assert 0.5 < summary["preference_accuracy"] <= 1
    assert 0 < summary["kl"] < 40
    assert summary["settings"]["output_dir"] == str(out)
    for when in ("before", "after"):
        assert 0 <= summary[f"fluency_{when}"]["sensible"] <= summary[f"fluency_{when}"]["grammatical"] <= 1

    pairs = [json.loads(line) for line in Path(out / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == summary["pairs"] and {"prompt", "chosen", "rejected"} <= pairs[0].keys()
    prompts = {json.loads(line)["prompt"] for line in Path(out / "samples.jsonl").read_text().splitlines()}
    assert not prompts & {pair["prompt"] for pair in pairs}

    base, trained = (AutoModelForCausalLM.from_pretrained(out / name) for name in ("base_model", "dpo_model"))
    assert AutoTokenizer.from_pretrained(out / "dpo_model").eos_token_id == trained.config.eos_token_id
    moved = [not torch.equal(a, b) for a, b in zip(base.parameters(), trained.parameters(), strict=True)]
    assert all(moved)
    assert "4/4" in done.stdout and "after DPO" in done.stdout and "fastdpo train" in done.stdout
    assert done.stderr == ""  # no line of another library on the screen
