"""CLOVER as a method of peft: every family, dense and pruned, through everything that one does with an adapter."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.conversion import convert_to_lora
from torch import nn

import families
from adapters import config, disturb, fresh, tuned
from clover import CloverConfig, CloverError, UnsupportedModelError
from clover.tuning.linear import CloverLinear
from clover.tuning.targets import find_slots
from families import CASES, build, outputs, pruned

EVERYTHING = ("qk", "q", "vo", "up", "gate")


# --- every family ---


@pytest.mark.parametrize("make", [build, pruned])
@pytest.mark.parametrize("name", CASES)
def test_contract(name: str, make: Any, tmp_path: Path) -> None:
    model, batch = make(name, dtype=torch.float32)
    base = copy.deepcopy(model)
    dense = outputs(model.requires_grad_(False), batch)  # frozen weights can sum in another order (MultiheadAttention)
    model = get_peft_model(model, config(parts=EVERYTHING)).eval()
    assert torch.equal(outputs(model, batch), dense), "a new adapter must change nothing"
    disturb(model)
    out = outputs(model, batch)
    moved = (out - dense).abs().max()
    assert moved > 1e-3

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(outputs(loaded, batch), out), "saved and loaded must be the same to the bit"

    model.merge_adapter()
    assert (outputs(model, batch) - out).abs().max() < 1e-4 * moved.clamp_min(1)
    model.unmerge_adapter()
    assert torch.equal(outputs(model, batch), out), "merged and taken out must be the same to the bit"
    with model.disable_adapter():
        assert torch.equal(outputs(model, batch), dense)
    merged = model.merge_and_unload()
    assert not any(isinstance(m, CloverLinear) for m in merged.modules())
    assert (outputs(merged, batch) - out).abs().max() < 1e-4 * moved.clamp_min(1)


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_number_of_parameters(core: str) -> None:
    model, _ = fresh()  # 2 layers, 2 KV heads of 8; MLP of 64 rows in blocks of 16
    model = get_peft_model(model, config(core=core))
    per_layer = (2 * 8**2) + (2 * 8**2) + (4 * 16**2) if core == "full" else 2 * 8 + 2 * 8 + 64
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * per_layer


# --- the adapter as peft users know it ---


def test_training_moves_the_cores_alone() -> None:
    model, batch = fresh()
    model = get_peft_model(model, config())
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if n.endswith(".change")}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, batch, _ = tuned()
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_adapters_add_up_and_can_be_switched_and_deleted() -> None:
    model, batch = fresh()
    dense = outputs(model, batch)
    model = get_peft_model(model, config(parts=("vo",)), adapter_name="a").eval()
    disturb(model, 0.1)
    a = outputs(model, batch)
    model.add_adapter("b", config(parts=("qk",)))
    model.set_adapter("b")
    assert torch.equal(outputs(model, batch), dense)
    disturb(model, 0.1)
    b = outputs(model, batch)
    model.base_model.set_adapter(["a", "b"])
    both = outputs(model, batch)
    assert not torch.allclose(both, a) and not torch.allclose(both, b)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(outputs(merged, batch), both, rtol=1e-4, atol=1e-4)
    model.delete_adapter("b")
    model.set_adapter("a")
    torch.testing.assert_close(outputs(model, batch), a)


def test_two_adapters_on_the_same_cores_merge_as_they_run() -> None:
    model, batch = fresh()
    model = get_peft_model(model, config(), adapter_name="a").eval()
    disturb(model)
    model.add_adapter("b", config())
    model.set_adapter("b")
    disturb(model)
    model.base_model.set_adapter(["a", "b"])
    both = outputs(model, batch)
    model.merge_adapter(["a"])
    with pytest.warns(UserWarning, match="additionally merging b"):
        model.merge_adapter(["b"])
    torch.testing.assert_close(outputs(model, batch), both, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(outputs(model, batch), both, rtol=1e-4, atol=1e-4)


def test_a_weighted_sum_of_adapters_is_refused() -> None:
    model, *_ = tuned()
    with pytest.raises(CloverError, match="no weighted sum; let several act at once"):
        model.add_weighted_adapter(["default"], [0.5], "half")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_merged_is_taken_out_to_the_bit_even_where_it_can_not_be_undone(dtype: torch.dtype) -> None:
    model = get_peft_model(fresh()[0].to(dtype), config(core="diagonal", parts=EVERYTHING))
    layers = [m for m in model.modules() if isinstance(m, CloverLinear)]
    before = [layer.get_base_layer().weight.clone() for layer in layers]
    for layer in layers:
        for core in layer.clover_cores["default"]:
            unit = core.values.square().mean(-1, keepdim=True).sqrt()
            core.change.data[:, 3] = -(core.values / unit)[:, 3]  # a singular value of zero
    model.merge_adapter()
    assert not any(torch.equal(layer.get_base_layer().weight, old) for layer, old in zip(layers, before, strict=True))
    with model.disable_adapter():
        model(torch.arange(5)[None])
    assert all(torch.equal(layer.get_base_layer().weight, old) for layer, old in zip(layers, before, strict=True))
    assert all(layer.original is None for layer in layers)


def test_a_merge_that_failed_leaves_the_base_to_be_changed() -> None:
    model = get_peft_model(fresh()[0], config())
    layer = next(m for m in model.modules() if isinstance(m, CloverLinear))
    core = layer.clover_cores["default"][0]
    core.change.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    core.change.data.fill_(0.1)
    layer.get_base_layer().weight.data.mul_(2)
    before = layer.get_base_layer().weight.clone()
    layer.merge()
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, before)


def test_no_second_adapter_while_one_is_merged() -> None:
    model, *_ = tuned()
    model.merge_adapter()
    with pytest.raises(CloverError, match="unmerge_adapter first"):
        model.add_adapter("b", config())


@pytest.mark.parametrize("copied", [lambda model: pickle.loads(pickle.dumps(model)), copy.deepcopy])
def test_a_pickled_model_is_the_same_and_takes_another_adapter(copied: Any) -> None:
    model, batch, out = tuned()
    model = copied(model)
    assert torch.equal(outputs(model, batch), out)
    model.add_adapter("b", config(parts=("q",)))
    model.set_adapter("b")
    assert torch.equal(outputs(model, batch), outputs(fresh()[0], batch))


def test_loading_computes_no_decomposition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, out = tuned()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("clover.tuning.targets.Slot.decompose", lambda *_: pytest.fail("decomposed while loading"))
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(fresh()[0], tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(outputs(loaded, batch), out)


def test_it_loads_under_another_name(tmp_path: Path) -> None:
    model, batch, out = tuned()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh()[0], tmp_path, adapter_name="0").eval()
    assert torch.equal(outputs(loaded, batch), out)
    loaded.load_adapter(tmp_path, "change")
    loaded.set_adapter("change")
    assert torch.equal(outputs(loaded, batch), out)


def test_transformers_loads_the_adapter(tmp_path: Path) -> None:
    model, batch, out = tuned()
    model.save_pretrained(tmp_path / "adapter")
    base, _ = fresh()
    base.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(outputs(base.eval(), batch), out, rtol=0, atol=0)
    other, _ = fresh()
    other.add_adapter(config())
    assert torch.equal(outputs(other.eval(), batch), outputs(fresh()[0], batch))


def test_the_config_survives(tmp_path: Path) -> None:
    made = config(parts=("vo",), core="diagonal", clover_dropout=0.1)
    made.save_pretrained(tmp_path)
    read = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(read, CloverConfig) and read.bases_stored and not made.bases_stored
    assert (read.parts, read.core, read.clover_dropout) == (("vo",), "diagonal", 0.1)
    model = get_peft_model(fresh()[0], read)
    with pytest.raises(RuntimeError, match="no bases yet"):
        outputs(model, fresh()[1])


def test_modules_to_save_and_biases_are_trained() -> None:
    model, _ = fresh("gpt2")
    model = get_peft_model(model, config(modules_to_save=["ln_f"], bias="clover_only"))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("ln_f.modules_to_save" in n for n in names)
    assert any(n.endswith("c_attn.base_layer.bias") for n in names)
    assert not any(n.endswith("c_proj.bias") for n in names)


def test_as_plain_lora_it_computes_the_same(tmp_path: Path) -> None:
    model, batch, out = tuned("opt")
    lora, state = convert_to_lora(model, rank=1.0)
    plain = get_peft_model(fresh("opt")[0], lora).eval()
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(plain, state)
    torch.testing.assert_close(outputs(plain, batch), out, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_folded_it_computes_the_same_from_a_third_of_the_file(core: str, tmp_path: Path) -> None:
    model, batch, out = tuned("opt", core=core)
    model.save_pretrained(tmp_path / "whole")
    model.fold()
    torch.testing.assert_close(outputs(model, batch), out, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "folded")
    loaded = PeftModel.from_pretrained(fresh("opt")[0], tmp_path / "folded").eval()
    assert torch.equal(outputs(loaded, batch), outputs(model, batch))
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("whole", "folded")]
    assert sizes[1] < 0.6 * sizes[0]
    other, _ = fresh("opt")
    other.model.decoder.layers[0].self_attn.v_proj.weight.data.mul_(2)
    with pytest.raises(RuntimeError, match="tuned on another base model"):
        PeftModel.from_pretrained(other, tmp_path / "folded")
    with pytest.raises(CloverError, match="adapter 'b' is unknown"):
        model.fold("b")


def test_bfloat16(tmp_path: Path) -> None:
    model, batch = build("llama-gqa", torch.bfloat16)
    dense = outputs(model, batch)
    model = get_peft_model(model, config()).eval()
    assert torch.equal(outputs(model, batch), dense)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    disturb(model)
    out = outputs(model, batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama-gqa", torch.bfloat16)[0], tmp_path).eval()
    assert torch.equal(outputs(loaded, batch), out)
    exact = PeftModel.from_pretrained(fresh()[0], tmp_path).eval()  # the same base, rounded less
    assert (outputs(exact, batch) - out).abs().max() < 0.1 * out.abs().max()


def test_compiled_in_one_graph_it_computes_the_same() -> None:
    """In a process without the checks of shapes, which the compiler can't follow."""
    code = """
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from clover import CloverConfig
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
model = get_peft_model(base, CloverConfig(block_size=16))
for p in model.parameters():
    if p.requires_grad:
        p.data.normal_(std=0.05)
ids = torch.arange(24).view(2, 12)
grads = {}
for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
    model.zero_grad()
    call(input_ids=ids, labels=ids).loss.backward()
    grads[call] = [p.grad.clone() for p in model.parameters() if p.requires_grad]
for one, other in zip(*grads.values(), strict=True):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_generation_is_that_of_the_merged_model() -> None:
    model, batch, _ = tuned()
    text = model.generate(**batch, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.merge_and_unload().generate(**batch, max_new_tokens=8, do_sample=False), text)


def test_what_an_adapter_adds_is_told_without_dropout() -> None:
    model, _, _ = tuned(clover_dropout=0.5)
    layer = next(m for m in model.train().modules() if isinstance(m, CloverLinear))
    assert torch.equal(layer.get_delta_weight("default"), layer.get_delta_weight("default"))
    assert layer.training


# --- what can't be done ---


def test_an_adapter_for_another_base_is_refused(tmp_path: Path) -> None:
    model, *_ = tuned()
    model.save_pretrained(tmp_path)
    other, _ = fresh()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    with pytest.raises(RuntimeError, match="tuned on another base model"):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(("made_for", "other"), [(build, pruned), (pruned, build)])
def test_an_adapter_of_the_dense_model_is_not_half_loaded_onto_the_pruned_one(
    made_for: Any, other: Any, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    get_peft_model(made_for("llama-gqa", dtype=torch.float32)[0], config()).save_pretrained(tmp_path)
    model, _ = other("llama-gqa", dtype=torch.float32)
    with pytest.raises(CloverError, match=r"core for model\.layers\.0\.self_attn\.\w+_proj, .* made for"):
        PeftModel.from_pretrained(model, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


@pytest.mark.parametrize("adapter_name", ["default", "0"])
def test_an_adapter_of_more_layers_is_refused(adapter_name: str, tmp_path: Path) -> None:
    model, *_ = tuned()
    model.save_pretrained(tmp_path)
    short, _ = fresh()
    del short.model.layers[1]
    with pytest.raises(CloverError, match=r"core for model\.layers\.1\."):
        PeftModel.from_pretrained(short, tmp_path, adapter_name=adapter_name)


def test_an_adapter_of_modules_that_the_user_named_loads(tmp_path: Path) -> None:
    model, batch, out = tuned(target_modules=["down_proj", "o_proj"], layers_to_transform=[1])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh()[0], tmp_path).eval()
    assert torch.equal(outputs(loaded, batch), out)
    loaded.add_adapter("b", config())
    loaded.load_adapter(tmp_path, "again")
    loaded.set_adapter("again")
    assert torch.equal(outputs(loaded, batch), out)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"parts": ("vo", "down")}, "'down'"),
        ({"parts": ()}, "choose among"),
        ({"core": "half"}, "'half'"),
        ({"bias": "lora_only"}, "'lora_only'"),
        ({"block_size": 0}, "block_size is 0"),
        ({"clover_dropout": 1.0}, "clover_dropout is 1.0"),
        ({"layers_pattern": "h"}, "layers_to_transform"),
    ],
)
def test_a_bad_config_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(CloverError, match=message):
        CloverConfig(**kwargs)


def test_a_block_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(CloverError, match=r"mlp.up_proj has 64 rows, which blocks of 48 don't divide"):
        get_peft_model(fresh()[0], config(block_size=48))


def test_a_target_that_is_no_projection_is_refused() -> None:
    with pytest.raises(ValueError, match=r"norm is a .*RMSNorm, which is not supported"):
        get_peft_model(fresh()[0], config(target_modules=["norm"]))


def test_a_model_without_known_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="name modules in target_modules"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), config())
    plain = get_peft_model(nn.Sequential(nn.Linear(40, 32)), config(target_modules=["0"]))
    assert sum(p.numel() for p in plain.parameters() if p.requires_grad) == 2 * 16**2


def test_nan_weights_are_refused() -> None:
    model, _ = fresh()
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(CloverError, match="contains NaN"):
        get_peft_model(model, config())


def test_rank_deficient_heads_warn_and_stay_finite() -> None:
    model, batch = fresh()
    model.model.layers[0].self_attn.v_proj.weight.data[:3] = 0
    with pytest.warns(UserWarning, match="3 of 16 directions of a 'vo' weight"):
        model = get_peft_model(model, config(parts=("vo",)))
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_safe_merge_refuses_nan() -> None:
    model, *_ = tuned()
    layer = next(m for m in model.modules() if isinstance(m, CloverLinear))
    layer.clover_cores["default"][0].change.data[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)


def test_an_adapter_for_each_row_is_refused() -> None:
    model, batch, out = tuned()
    names = ["__base__"] * len(out)
    for call in (model, model.generate):
        with pytest.raises(CloverError, match=r"adapter_names is \['__base__'.* set_adapter.* disable_adapter"):
            call(**batch, adapter_names=names)
    assert torch.equal(model(**batch, adapter_names=None).logits, model(**batch).logits)


def test_what_a_block_size_does_not_divide_can_be_left_out() -> None:
    model, _ = fresh()
    get_peft_model(model, config(block_size=48, parts=("qk", "vo")))
    model, _ = fresh()
    get_peft_model(model, config(block_size=48, exclude_modules=r".*mlp.*"))


# --- slots ---


@pytest.mark.parametrize("make", [build, pruned])
@pytest.mark.parametrize("name", CASES)
def test_slots_cover_every_attention_once(name: str, make: Any) -> None:
    model, _ = make(name)
    modules = dict(model.named_modules())
    for path, slots in find_slots(model, 16).items():
        weight: Any = modules[path]
        rows = torch.cat([s.rows.flatten() for s in slots])
        assert len(rows.unique()) == len(rows) <= max(weight.weight.shape)


@pytest.mark.parametrize("name", families.GENERATIVE)
def test_pairs_reach_across_the_layer_where_they_can(name: str) -> None:
    model, _ = build(name)
    alone = {True, False} if name in families.MIXED else {name not in (*families.STILL, *families.LATENT)}
    slots = [s for found in find_slots(model, 16).values() for s in found]
    assert {s.partner is None for s in slots if s.part == "qk"} == alone
    assert all(s.partner is not None for s in slots if s.part == "vo")


@pytest.mark.parametrize("name", ["lfm2", "bamba", "llama-gqa"])
def test_only_layers_with_attention_are_tuned(name: str) -> None:
    """Other layers of a model may hold modules of the same names."""
    model, _ = build(name, torch.float32)
    found = find_slots(model, 16)
    tuned = get_peft_model(model, CloverConfig(block_size=16)).base_model.model
    wrapped = {n for n, module in tuned.named_modules() if isinstance(module, CloverLinear)}
    assert wrapped == {n for n, slots in found.items() if any(s.part in ("qk", "vo", "up") for s in slots)}


def test_layers_are_chosen_where_modules_are_named_one_by_one() -> None:
    model, _ = build("lfm2", torch.float32)
    attention = [n for n, m in model.named_modules() if n.endswith("self_attn")]
    layer = int(attention[-1].split(".")[2])
    tuned = get_peft_model(model, CloverConfig(block_size=16, layers_to_transform=[layer])).base_model.model
    wrapped = {n for n, module in tuned.named_modules() if isinstance(module, CloverLinear)}
    assert wrapped and all(n.startswith(f"model.layers.{layer}.") for n in wrapped)
    with pytest.raises(CloverError, match=r"layers_to_transform=\[9\].* leave nothing to tune"):
        get_peft_model(build("lfm2", torch.float32)[0], CloverConfig(block_size=16, layers_to_transform=[9]))
