"""Several adapters side by side, and what becomes of their configs and dtypes."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import clover
from adapters import config, disturb, fresh, tuned
from clover import CloverError
from clover.tuning.linear import CloverLinear
from families import build, outputs
from tiny import LM


def test_another_adapter_of_a_loaded_config_shares_its_bases(tmp_path: Path) -> None:
    """As preference trainers make their reference: a second adapter, into which they copy what is trained."""
    model, batch, out = tuned()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh()[0], tmp_path, is_trainable=True).eval()
    loaded.add_adapter("ref", loaded.peft_config["default"])
    with torch.no_grad():
        for name, parameter in loaded.named_parameters():
            if ".default." in name:
                loaded.get_parameter(name.replace(".default.", ".ref.")).copy_(parameter)
    loaded.set_adapter("ref")
    assert torch.equal(outputs(loaded, batch), out)


@pytest.mark.parametrize("method", ["clover", "lora"])
def test_an_adapter_of_a_model_that_was_pruned_a_moment_ago(method: str, tmp_path: Path) -> None:
    """peft asks the folder that the model came from how many words it had; that config has no plan."""
    clover.save(fresh()[0], tmp_path / "dense")
    model, batch = clover.load(tmp_path / "dense"), fresh()[1]
    clover.prune(model, vo=0.25)
    clover.save(model, tmp_path / "pruned")
    wanted = config() if method == "clover" else LoraConfig(target_modules="all-linear")
    tuned = get_peft_model(model, wanted).eval()
    disturb(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(clover.load(tmp_path / "pruned"), tmp_path / "adapter").eval()
    assert torch.equal(outputs(loaded, batch), outputs(tuned, batch))


def test_an_adapter_that_can_not_be_added_leaves_nothing_behind(tmp_path: Path) -> None:
    model, batch, out = tuned()
    with pytest.raises(CloverError, match="blocks of 7 don't divide"):
        model.add_adapter("b", config(target_modules=["v_proj", "down_proj"], block_size=7))
    assert not any("clover_cores.b" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(PeftModel.from_pretrained(fresh()[0], tmp_path).eval(), batch), out)


def test_what_failed_can_be_tried_again_on_the_same_model() -> None:
    """peft would take what is left of a first try for a tuned model, and train all its weights."""
    model, _ = fresh()
    with pytest.raises(CloverError, match="blocks of 48 don't divide"):
        get_peft_model(model, config(block_size=48))
    assert not any(isinstance(module, CloverLinear) for module in model.modules())
    again = get_peft_model(model, config())
    trained = {name for name, p in again.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in get_peft_model(fresh()[0], config()).named_parameters() if p.requires_grad}
    assert all("clover_cores" in name for name in trained)


def test_all_linear_leaves_out_what_blocks_do_not_divide(tmp_path: Path) -> None:
    model, batch = fresh()
    model.model.layers[0].mlp.gate = torch.nn.Linear(32, 1)
    twin = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"mlp\.gate has 1 rows, which blocks of 16 don't divide: it stays as it is"):
        tuned = get_peft_model(model, config(target_modules="all-linear"))
    assert type(tuned.base_model.model.model.layers[0].mlp.gate) is torch.nn.Linear
    assert isinstance(tuned.base_model.model.model.layers[0].mlp.down_proj, CloverLinear)
    disturb(tuned)
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(twin, tmp_path).eval()
    assert torch.equal(outputs(loaded, batch), outputs(tuned.eval(), batch))


def test_bases_are_float32_whatever_torch_makes_by_default() -> None:
    model, _ = fresh()
    torch.set_default_dtype(torch.bfloat16)
    try:
        held = get_peft_model(model, config()).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {v.dtype for k, v in held.items() if "clover_cores" in k} == {torch.float32}


def test_all_linear_means_those_that_are_wrapped_too() -> None:
    model, _, _ = tuned()
    model.add_adapter("b", config(target_modules="all-linear"))
    assert any("k_proj.clover_cores.b" in name for name in model.state_dict())


def test_an_adapter_whose_parts_are_called_like_another_is_not_saved_without_them(tmp_path: Path) -> None:
    model, *_ = tuned()
    model.save_pretrained(tmp_path / "a")
    model.load_adapter(tmp_path / "a", "0")
    with pytest.raises(CloverError, match="'default' can't be saved beside '0'"):
        model.save_pretrained(tmp_path / "b")


def test_an_adapter_called_like_a_part_of_the_model_is_not_saved_with_another(tmp_path: Path) -> None:
    model, *_ = tuned()
    model.add_adapter("model", config())
    with pytest.raises(CloverError, match="'default' can't be saved beside 'model'"):
        model.save_pretrained(tmp_path / "b")


def test_the_users_config_stays_as_it_is() -> None:
    asked = config()
    model = get_peft_model(fresh()[0], asked)
    model.base_model.fold()
    assert asked.core == "full" and model.peft_config["default"].core == "folded"


def test_a_pattern_of_modules_and_layers_contradict() -> None:
    with pytest.raises(CloverError, match="leave out layers_to_transform"):
        config(target_modules=".*v_proj", layers_to_transform=[0])


@pytest.mark.parametrize("widely", [True, False])
def test_what_is_trained_is_wide_unless_asked_otherwise(widely: bool, tmp_path: Path) -> None:
    model, *_ = tuned()
    model.save_pretrained(tmp_path)
    base = fresh()[0].to(torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=widely)
    assert {p.dtype for n, p in loaded.named_parameters() if n.endswith("change")} == {
        torch.float32 if widely else torch.bfloat16
    }
    if widely:
        file = load_file(tmp_path / "adapter_model.safetensors")
        stored = {k: v for k, v in file.items() if k.endswith("change")}
        held = {n.replace(".default", ""): p for n, p in loaded.named_parameters()}
        assert stored and all(torch.equal(held[k], v) for k, v in stored.items())


def test_the_change_of_a_merged_weight_is_that_of_the_base() -> None:
    model, *_ = tuned()
    layer = next(m for m in model.modules() if isinstance(m, CloverLinear))
    change = layer.get_delta_weight("default")
    layer.merge()
    torch.testing.assert_close(layer.get_delta_weight("default"), change)


@pytest.mark.parametrize(("task", "head"), [("TOKEN_CLS", "classifier"), ("QUESTION_ANS", "qa_outputs")])
def test_the_head_of_a_task_is_trained_beside(task: str, head: str, tmp_path: Path) -> None:
    """peft names it in the config that it was given, of which the tuner has a copy."""
    torch.manual_seed(0)
    kind = {"TOKEN_CLS": transformers.BertForTokenClassification, "QUESTION_ANS": transformers.BertForQuestionAnswering}
    base, batch = kind[task](transformers.BertConfig(**LM)).eval(), {"input_ids": torch.randint(3, 60, (2, 9))}
    model = get_peft_model(copy.deepcopy(base), config(task_type=task)).eval()
    assert any(head in name for name, p in model.named_parameters() if p.requires_grad)
    disturb(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(loaded(**batch)[0], model(**batch)[0])
    torch.testing.assert_close(loaded.merge_and_unload()(**batch)[0], model(**batch)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_the_embedding_are_merged_too(tied: bool) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LM, tie_word_embeddings=tied)).eval()
    batch = {"input_ids": torch.tensor([[3, 5, 6, 9]])}
    model = get_peft_model(model, config(task_type="CAUSAL_LM", trainable_token_indices=[5, 6])).eval()
    disturb(model)
    found = outputs(model, batch)
    torch.testing.assert_close(outputs(model.merge_and_unload(), batch), found, atol=1e-4, rtol=1e-4)


def test_a_base_in_double_precision_is_trained() -> None:
    model, batch = build("llama-gqa", torch.float64)
    model = get_peft_model(model, config())
    disturb(model)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad and p.grad is not None)


def test_an_adapter_as_wide_as_a_base_in_double_precision(tmp_path: Path) -> None:
    model, batch = build("llama-gqa", torch.float64)
    base = copy.deepcopy(model)
    model = get_peft_model(model, config(), autocast_adapter_dtype=False)
    disturb(model)
    found = outputs(model, batch)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    assert all(p.dtype == torch.float64 for p in again.parameters())
    torch.testing.assert_close(outputs(again, batch), found)
    torch.testing.assert_close(outputs(model.merge_and_unload(), batch), found)


@pytest.mark.parametrize("when", ["adding", "merging"])
def test_four_bits_that_were_packed_for_a_cpu(when: str) -> None:
    """bitsandbytes says so of a weight, and can't read it back."""
    model, _ = build("llama-gqa")
    if when == "merging":
        model = get_peft_model(model, config())
    for module in (m for m in model.modules() if type(m) is torch.nn.Linear):
        module.weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)
    with pytest.raises(CloverError, match=r"packed a 4-bit weight for this CPU .* load the model again"):
        model.merge_and_unload() if when == "merging" else get_peft_model(model, config())


def test_a_kept_weight_is_put_back_without_a_look_at_the_merged_one() -> None:
    model, batch, _ = tuned()
    with model.disable_adapter():
        before = outputs(model, batch)
    model.merge_adapter()
    for module in (m for m in model.modules() if type(m) is torch.nn.Linear):
        module.weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)  # which can't be read
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(outputs(model, batch), before)


def test_a_model_with_added_adapters_is_not_saved_as_if_whole(tmp_path: Path) -> None:
    model, _ = fresh()
    clover.prune(model, vo=0.3)
    model.add_adapter(config(), "more")
    with pytest.raises(CloverError, match="transformers then writes them alone; save the model before add_adapter"):
        clover.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
