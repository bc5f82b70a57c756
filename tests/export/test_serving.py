"""What vLLM and llama.cpp refuse or change of adapters that PEFT really wrote."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from made_adapters import KINDS, make_adapter, make_base
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from fastdpo.commands.cli import main
from fastdpo.export.live import MergeError
from fastdpo.export.serving import Finding, check_llama_cpp, check_vllm, facts_of

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {tied: make_base(root / str(tied), tie_word_embeddings=tied) for tied in (True, False)}


def told(findings: list[Finding]) -> set[str]:
    """A mark of each: ``-`` refused, ``~`` changed."""
    return {f"{'-' if finding.is_refused else '~'} {finding.what}" for finding in findings}


KEPT_BASE = "~ it holds the base's own embedding as well"
RESIZED = "- it holds lm_head.weight, model.embed_tokens.weight, which are no LoRA (embeddings that were resized)"
TOKENS = "- it trains tokens by themselves"
# kind -> what vLLM, and what llama.cpp has against it, on a base whose embeddings are two.
EXPECTED: dict[str, tuple[set[str], set[str]]] = {
    "LoRA": (set(), set()),
    "rsLoRA": ({"~ it has rank_pattern"}, {"~ it is an rsLoRA"}),
    "DoRA": ({"- it is a DoRA"}, {"- it is a DoRA"}),
    "LoRA on the head": ({"~ lm_head is a target", KEPT_BASE}, {KEPT_BASE}),
    "LoRA on the embedding": ({"~ embed_tokens is a target", KEPT_BASE}, {KEPT_BASE}),
    "LoRA on both embeddings": ({"~ embed_tokens and lm_head are targets", KEPT_BASE}, {KEPT_BASE}),
    "the head saved": ({"- modules_to_save holds lm_head"}, {"- modules_to_save holds lm_head"}),
    "embedding and norms saved": (
        {"- modules_to_save holds embed_tokens, norm"},
        {"- modules_to_save holds embed_tokens", "~ modules_to_save holds norm"},
    ),
    "trainable tokens": ({TOKENS}, {TOKENS}),
    "resized": ({RESIZED}, {RESIZED}),
    "resized, both embeddings saved": ({"- modules_to_save holds embed_tokens, lm_head"},) * 2,
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_kinds(kind: str, bases: dict[bool, Path], tmp_path: Path) -> None:
    facts = facts_of(str(make_adapter(tmp_path / "adapter", bases[False], **KINDS[kind])))
    assert (told(check_vllm(facts)), told(check_llama_cpp(facts))) == EXPECTED[kind]
    for finding in (*check_vllm(facts), *check_llama_cpp(facts)):
        assert "fastdpo merge" in finding.help


def test_ranks_scales_and_tied_heads(bases: dict[bool, Path], tmp_path: Path) -> None:
    def facts(name: str, base: Path, **options: Any) -> Any:
        return facts_of(str(make_adapter(tmp_path / name, base, **({"target_modules": ["q_proj"]} | options))))

    high = facts("high", bases[False], r=17, rank_pattern={})
    (finding,) = check_vllm(high)
    assert finding.what == "its rank is 17" and finding.help == "start vLLM with --max-lora-rank 32"
    assert check_vllm(high, 32) == [] and check_llama_cpp(high) == []
    (finding,) = check_llama_cpp(facts("rs", bases[False], use_rslora=True, r=16))
    assert "1/4 of" in finding.happens and finding.help.endswith("--lora-scaled with 4")
    pattern = facts("pattern", bases[False], alpha_pattern={"layers.0": 3})
    assert told(check_vllm(pattern)) == told(check_llama_cpp(pattern)) == {"~ it has alpha_pattern"}
    tied = facts("tied", bases[True], target_modules=["q_proj", "lm_head"])
    assert "- lm_head is a target, and the base's embeddings are one" in told(check_llama_cpp(tied))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "eva", "orthogonal", "gaussian"])
def test_adapters_that_take_from_their_base(init: str, bases: dict[bool, Path], tmp_path: Path) -> None:
    """PEFT changes the base as it loads them; who does not adds them to another one."""
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init)
    facts = facts_of(str(make_adapter(tmp_path / "adapter", bases[False], config)))
    told_of = f"it was begun by {init} (init_lora_weights), for which PEFT changes the base"
    taking = init.startswith(("pissa", "olora"))
    assert told(check_vllm(facts)) == ({f"- {told_of}"} if taking else set())
    assert told(check_llama_cpp(facts)) == ({f"~ {told_of}"} if taking else set())
    base = AutoModelForCausalLM.from_pretrained(bases[False])
    before = base.model.layers[0].self_attn.q_proj.weight.clone()
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    after = loaded.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert torch.equal(before, after) == (not taking), "what the rule goes by"


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_lora_on_embeddings_of_another_size(target: str, bases: dict[bool, Path], tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", bases[False], target_modules=["q_proj", target], rows=390)
    facts = facts_of(str(folder))
    other = "- it has LoRA on embeddings of 390 tokens, and the base has 384"
    assert other in told(check_vllm(facts)) and other in told(check_llama_cpp(facts))
    (folder / "adapter_config.json").write_text(
        (folder / "adapter_config.json").read_text().replace(str(bases[False]), str(tmp_path / "gone"))
    )
    assert other not in told(check_vllm(facts_of(str(folder)))), "of a base that is not there nothing is known"


def test_other_variants(bases: dict[bool, Path], tmp_path: Path) -> None:
    words = {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}
    facts = facts_of(str(make_adapter(tmp_path / "alora", bases[False], target_modules=["q_proj"], **words)))
    assert told(check_vllm(facts)) == {"- it is an activated LoRA"} and check_llama_cpp(facts) == []
    pooled = dataclasses.replace(facts, config={**facts.config, "alora_invocation_tokens": None, "use_qalora": True})
    assert told(check_vllm(pooled)) == told(check_llama_cpp(pooled)) == {"- it is a QALoRA"}


OTHERS: dict[str, tuple[Any, str]] = {
    "biases": (LoraConfig(target_modules=["c_attn"], bias="all"), "- it trains biases (bias='all')"),
    "lora_bias": (LoraConfig(target_modules=["c_attn"], lora_bias=True), "- its matrices have biases (lora_bias)"),
    "IA3": (peft.IA3Config(target_modules=["c_proj"], feedforward_modules=[]), "- it is of the kind IA3"),
    "prompt": (
        peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        "- it is of the kind PROMPT_TUNING",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds(kind: str, tmp_path: Path) -> None:
    config, what = OTHERS[kind]
    facts = facts_of(str(make_adapter(tmp_path / "adapter", make_base(tmp_path / "base", "gpt2"), config)))
    assert told(check_vllm(facts)) == told(check_llama_cpp(facts)) == {what}


def test_the_command(bases: dict[bool, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = str(make_adapter(tmp_path / "plain", bases[False], target_modules=["q_proj"]))
    assert main(["export", plain, "--check-vllm", "--check-llama-cpp"]) == 0
    assert capsys.readouterr().out == "vLLM: takes it as it is.\nllama.cpp: takes it as it is.\n"
    rs = str(make_adapter(tmp_path / "rs", bases[False], target_modules=["q_proj"], use_rslora=True))
    assert main(["export", rs, "--check-llama-cpp"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("llama.cpp: takes it, and not all of it as it is.\n  changed: it is an rsLoRA; ")
    dora = str(make_adapter(tmp_path / "dora", bases[False], target_modules=["q_proj"], use_dora=True))
    assert main(["export", dora, "--check-vllm"]) == 2
    assert "vLLM: refuses it.\n  refused: it is a DoRA; vLLM refuses its magnitudes. What to do: fastdpo merge." in (
        capsys.readouterr().out
    )
    for words, error in (
        ([plain], "check for what? --check-vllm"),
        ([plain, "--check-llama-cpp", "--max_lora_rank", "8"], "no effect without --check-vllm"),
        ([str(bases[False]), "--check-vllm"], "is no adapter"),
        ([str(tmp_path / "nowhere"), "--check-vllm"], "no such folder"),
        (["nowhere", "--check-vllm"], "there is no folder nowhere, and no adapter of that name on the Hub"),
    ):
        assert main(["export", *words]) == 2
        assert error in capsys.readouterr().err
    with pytest.raises(MergeError):
        facts_of(str(bases[True]))
