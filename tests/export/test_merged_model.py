"""Every kind of adapter, merged: what is read back says what the adapter on its base said, or it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from made_adapters import KINDS, LINEAR, make_adapter, make_base
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fastdpo.export import merging
from fastdpo.export.folder import new_folder, write_model
from fastdpo.export.live import MergeError, source_of
from fastdpo.export.merged_model import make_merged
from fastdpo.model.adapters import put_on
from fastdpo.model.quantization import keep_as_trained

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("llama", "qwen3", "gemma3_text")
# Every family by hand; by itself, the suite has the first, and the one that is unlike it.
TRIED = ["llama", pytest.param("qwen3", marks=pytest.mark.slow), "gemma3_text"]
TIED = {"tied": True, "untied": False}
# Of the issue; and of the sums of these models, whose logits are of some units.
ATOL = 1e-5


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        (family, tied): make_base(root / f"{family}-{tied}", family, tie_word_embeddings=tied)
        for family in FAMILIES
        for tied in TIED.values()
    }


@torch.no_grad()
def logps(model: Any) -> torch.Tensor:
    """Of all tokens, in a batch: computed apart from the code that is tested."""
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(size, (3, 24), generator=torch.Generator().manual_seed(5))
    ids[0, :12] = torch.arange(size - 12, size)
    return model.eval()(input_ids=ids).logits.double().log_softmax(-1)


def live_logps(base: Path, *adapters: Path) -> torch.Tensor:
    model: Any = put_on(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapters[0]))
    for number, adapter in enumerate(adapters[1:]):
        model.load_adapter(str(adapter), adapter_name=f"other{number}")
        model.base_model.set_adapter(["default", *(f"other{i}" for i in range(number + 1))])
    return logps(model)


def merged_folder(folder: Path, *adapters: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    merged = make_merged(source_of([str(adapter) for adapter in adapters], **options))
    with new_folder(folder) as part:
        write_model(merged, part, dtype, None)
    return folder


@pytest.mark.parametrize("tied", TIED)
@pytest.mark.parametrize("family", TRIED)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_back_says_the_same(
    kind: str, family: str, tied: str, bases: dict[tuple[str, bool], Path], tmp_path: Path
) -> None:
    base = bases[family, TIED[tied]]
    adapter = make_adapter(tmp_path / "adapter", base, **KINDS[kind])
    expected = live_logps(base, adapter)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        merged_folder(tmp_path / "merged", adapter), output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    largest = (logps(loaded) - expected).abs().max().item()
    print(f"{kind:34} {family:12} {tied:7} {largest:.1e}")
    assert largest <= ATOL
    plain = AutoModelForCausalLM.from_pretrained(base)
    if expected.shape == logps(plain).shape:
        assert (logps(plain) - expected).abs().max() > 100 * ATOL  # or nothing is shown
    one_changes = ("the head", "embedding and norms", "LoRA on the", "LoRA on both")
    assert loaded.config.tie_word_embeddings == (TIED[tied] and not kind.startswith((*one_changes, "resized, both")))


def test_peft_by_itself_changes_the_other_embedding(bases: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    """What this is for: in place, an update of the head is one of the embedding as well."""
    base = bases["llama", True]
    adapter = make_adapter(tmp_path / "adapter", base, **KINDS["LoRA on the head"])
    merged = put_on(AutoModelForCausalLM.from_pretrained(base), str(adapter)).merge_and_unload()
    assert (logps(merged) - live_logps(base, adapter)).abs().max() > 0.1


OTHERS: dict[str, Any] = {
    "biases": LoraConfig(r=4, target_modules=["c_attn"], bias="all", task_type="CAUSAL_LM"),
    "fan in, fan out": LoraConfig(r=4, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True),
    "PiSSA": LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights="pissa"),
    "IA3": peft.IA3Config(target_modules=["c_attn", "c_proj"], feedforward_modules=["c_proj"], fan_in_fan_out=True),
    "LoHa": peft.LoHaConfig(r=4, target_modules=["lm_head"]),
    "LoKr": peft.LoKrConfig(r=4, target_modules=["lm_head"]),
    "OFT": peft.OFTConfig(r=0, oft_block_size=8, target_modules=["lm_head"]),
    "VeRA": peft.VeraConfig(r=4, target_modules=["lm_head"]),
    "AdaLoRA": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["lm_head"]),
    "tokens alone": peft.TrainableTokensConfig(token_indices=[5, 6], target_modules=["wte"]),
    "norms": peft.LNTuningConfig(target_modules=["ln_f"]),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds(kind: str, tmp_path: Path) -> None:
    """On a model with transposed weights, biases and tied embeddings."""
    base = make_base(tmp_path / "base", "gpt2")
    adapter = make_adapter(tmp_path / "adapter", base, OTHERS[kind])
    expected = live_logps(base, adapter)
    try:
        folder = merged_folder(tmp_path / "merged", adapter)
    except MergeError as error:
        pytest.fail(str(error))
    assert (logps(AutoModelForCausalLM.from_pretrained(folder)) - expected).abs().max() <= ATOL


def test_layers_that_share_their_weights(bases: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    base = bases["llama", False]
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
    folder = merged_folder(tmp_path / "merged", adapter)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.num_hidden_layers == 3
    assert (logps(loaded) - live_logps(base, adapter)).abs().max() <= ATOL


def test_several_adapters_are_summed(bases: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    base = bases["qwen3", True]
    one = make_adapter(tmp_path / "one", base, target_modules=["q_proj", "lm_head"])
    other = make_adapter(tmp_path / "other", base, target_modules=LINEAR, seed=8, lora_alpha=3, use_rslora=True)
    expected = live_logps(base, one, other)
    folder = merged_folder(tmp_path / "merged", one, other)
    assert (logps(AutoModelForCausalLM.from_pretrained(folder)) - expected).abs().max() <= ATOL
    assert (live_logps(base, one) - expected).abs().max() > 100 * ATOL


def test_a_base_in_4_bits(bases: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    base = bases["llama", True]
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "lm_head"])
    options: dict[str, Any] = {"load_in_4bit": True, "quant_type": "fp4"}
    source = source_of([str(adapter)], **options)
    merged = make_merged(source)
    assert merged.apart.largest <= merged.tolerance
    folder = merged_folder(tmp_path / "merged", adapter, **options)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert getattr(loaded.config, "quantization_config", None) is None
    for kind, is_same in (("fp4", True), ("nf4", False)):
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float32)
        quantized = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, quantization_config=config, device_map="cpu"
        )
        keep_as_trained(quantized)
        apart = (logps(loaded) - logps(PeftModel.from_pretrained(quantized, adapter))).abs().max()
        assert apart <= ATOL if is_same else apart > 100 * ATOL
    own = merged_folder(tmp_path / "own", adapter, load_in_4bit=False)
    assert (logps(AutoModelForCausalLM.from_pretrained(own)) - live_logps(base, adapter)).abs().max() <= ATOL


def test_a_base_that_is_stored_in_4_bits(bases: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    quantized = AutoModelForCausalLM.from_pretrained(
        bases["llama", False],
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
        device_map="cpu",
    )
    quantized.save_pretrained(tmp_path / "base")
    keep_as_trained(quantized)
    adapter = make_adapter(tmp_path / "adapter", bases["llama", False], **KINDS["LoRA"])
    folder = merged_folder(tmp_path / "merged", adapter, base=str(tmp_path / "base"))
    expected = logps(PeftModel.from_pretrained(quantized, adapter))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert (logps(loaded) - expected).abs().max() <= ATOL
    assert getattr(loaded.config, "quantization_config", None) is None


# --------------------------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------------------------


def test_kinds_that_are_no_weights(bases: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    base = bases["llama", False]
    prompt = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    adapter = make_adapter(tmp_path / "prompt", base, prompt)
    with pytest.raises(MergeError, match="is of the kind PROMPT_TUNING, which is put before the prompt"):
        source_of([str(adapter)])
    activated = LoraConfig(r=4, target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    adapter = make_adapter(tmp_path / "alora", base, activated)
    with pytest.raises(MergeError, match="activated LoRA"):
        source_of([str(adapter)])
    biased = make_adapter(tmp_path / "biased", base, target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(MergeError, match=r"\(LoraModel\) cannot be merged: Impossible to merge LoRA with `lora_bias"):
        make_merged(source_of([str(biased)]))


def test_an_adapter_of_another_model(bases: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    deeper = make_base(tmp_path / "deeper", "llama", num_hidden_layers=3)
    adapter = make_adapter(tmp_path / "adapter", deeper, target_modules=["q_proj"])
    base = str(bases["llama", False])
    with pytest.raises(MergeError, match="no place for: .*layers.2.*--base_model names the base"):
        make_merged(source_of([str(adapter)], base=base))
    adapter = make_adapter(tmp_path / "shallow", bases["llama", False], target_modules=["q_proj"])
    with pytest.raises(MergeError, match="lacks what its configuration names: .*layers.2"):
        make_merged(source_of([str(adapter)], base=str(deeper)))
    wider = make_base(tmp_path / "wider", "llama", hidden_size=64)
    with pytest.raises(MergeError, match="cannot be loaded on the base: .*size mismatch"):
        make_merged(source_of([str(adapter)], base=str(wider)))


def test_names_that_do_not_go_together(bases: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    base, other = bases["llama", False], bases["qwen3", False]
    one = make_adapter(tmp_path / "one", base, target_modules=["q_proj"])
    two = make_adapter(tmp_path / "two", other, target_modules=["q_proj"])
    with pytest.raises(MergeError, match="of different bases: .*--base_model"):
        source_of([str(one), str(two)])
    with pytest.raises(MergeError, match="is no adapter; the base of an adapter"):
        source_of([str(one), str(base)])
    with pytest.raises(MergeError, match="name one model, or adapters"):
        source_of([str(base), str(other)])
    with pytest.raises(MergeError, match=r"is an adapter too; .*fastdpo merge .* --output_dir.*--base_model"):
        source_of([str(two)], base=str(one))
    with pytest.raises(MergeError, match=r"^\S*nowhere cannot be loaded \("):
        make_merged(source_of([str(one)], base=str(tmp_path / "nowhere")))


def test_a_merge_that_changes_the_model_is_refused(
    bases: dict[tuple[str, bool], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tmp_path / "adapter", bases["llama", True], **KINDS["LoRA on the head"])
    monkeypatch.setattr(merging, "_part_what_differs", lambda model: None)
    with pytest.raises(MergeError, match="is another than the adapter on its base: log-prob.*nothing was written"):
        make_merged(source_of([str(adapter)]))


def test_weights_that_are_no_numbers(bases: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = make_adapter(tmp_path / "adapter", bases["llama", False], target_modules=["q_proj"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(iter(tensors))][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(MergeError, match="no numbers|cannot be merged"):
        make_merged(source_of([str(adapter)]))
