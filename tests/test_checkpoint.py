"""Saving and loading: equal outputs here and in a new process, and nothing that runs on garbage."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import clover
from clover.errors import CloverError
from clover.jobs.folders import check_writable
from families import CASES, build, outputs, pruned
from samples import tokenizer, whisper_processor
from tiny import LM

NEW_PROCESS = ["llama-gqa", "qwen3", "phi3-partial", "gpt-neox", "gpt2", "bloom", "bert", "clip", "whisper"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pruned models of several families, each beside a batch and the outputs that it should give."""
    folder = tmp_path_factory.mktemp("models")
    for name in NEW_PROCESS:
        model, batch = pruned(name)
        clover.save(model, folder / name, max_shard_size="20KB")
        torch.save((batch, outputs(model, batch)), folder / f"{name}.pt")
    return folder


def python(code: str, *args: Any) -> subprocess.CompletedProcess[str]:
    """Run code in a new process, where warnings are not errors, as at a user's."""
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent / "src"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, env=env, timeout=300
    )


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal but for the last digits: convolutions sum in an order that depends on where the weights lie in memory."""
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def edit(folder: Path, change: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


# --- round trip ---


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    model, batch = pruned(name)
    kind, before = type(model), outputs(model, batch)
    clover.save(model, tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    loaded = clover.load(tmp_path / "model")
    assert type(loaded) is kind and loaded.dtype == torch.float64
    same(outputs(loaded, batch), before)
    assert clover.plan_of(loaded) == clover.plan_of(model)
    assert clover.summary(loaded) == clover.summary(model)
    stock = getattr(transformers, kind.__name__.removeprefix("Clover"))
    with pytest.raises(Exception, match="unknown before `import clover`"):  # whatever a family's constructor raises
        stock.from_pretrained(tmp_path / "model")
    for given in ("eager", "sdpa"):  # an argument takes the place of what the config says
        with pytest.raises(Exception, match="unknown before `import clover`"):
            stock.from_pretrained(tmp_path / "model", attn_implementation=given)
    torch.save(loaded.state_dict(), io.BytesIO())


@pytest.mark.parametrize(
    ("name", "auto", "side"),
    [
        ("t5", "AutoModelForTextEncoding", "encoder"),
        ("bart", "AutoModelForCausalLM", "model.decoder"),
        ("whisper", "AutoModelForCausalLM", "model.decoder"),
        ("whisper", "AutoModelForAudioClassification", "encoder"),
    ],
)
def test_one_side_of_a_pruned_model_is_loaded(name: str, auto: str, side: str, tmp_path: Path) -> None:
    """As transformers does it: what the class leaves out is left out, of the plan as of the tensors."""
    model = pruned(name)[0]
    clover.save(model, tmp_path / "model")
    loaded = getattr(transformers, auto).from_pretrained(tmp_path / "model")
    mine = loaded.get_submodule(side).state_dict()
    whole = model.get_submodule(side if name == "t5" else f"model.{side.rpartition('.')[2]}").state_dict()
    layers = [k for k in mine if "layers." in k or "block." in k]  # BART's decoder shares its embeddings with a head
    assert layers and mine.keys() == whole.keys() and all(torch.equal(mine[k], whole[k]) for k in layers)
    again = clover.load(clover.save(loaded, tmp_path / "side"))
    assert type(again) is type(loaded) and clover.plan_of(again) == clover.plan_of(loaded)


def test_a_class_with_no_block_of_the_plan_is_refused(tmp_path: Path) -> None:
    clover.save(pruned("llama-gqa")[0], tmp_path / "model")
    with pytest.raises(CloverError, match=r"LlamaForQuestionAnswering has none of the blocks that the plan cuts"):
        transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("name", CASES)
def test_round_trip_of_what_was_loaded(name: str, tmp_path: Path) -> None:
    """transformers keeps old names of tensors for a model that came from a file (ViT, GPT-NeoX)."""
    model, batch = build(name)
    clover.save(model, tmp_path / "dense")
    model = clover.orthogonalize(clover.load(tmp_path / "dense"))
    clover.save(model, tmp_path / "turned")
    same(outputs(clover.load(tmp_path / "turned"), batch), outputs(model, batch))


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "whisper"])
def test_saved_again_after_loading(name: str, tmp_path: Path) -> None:
    model, batch = pruned(name)
    clover.save(model, tmp_path / "first")
    clover.save(clover.load(tmp_path / "first"), tmp_path / "second")
    assert (tmp_path / "first/config.json").read_text() == (tmp_path / "second/config.json").read_text()
    same(outputs(clover.load(tmp_path / "second"), batch), outputs(model, batch))


def test_save_pretrained_and_from_pretrained(tmp_path: Path) -> None:
    """The methods that every user of transformers knows do the same."""
    model, batch = pruned("llama-gqa")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, transformers.LlamaForCausalLM)
    assert torch.equal(outputs(again.eval(), batch), outputs(model, batch))


@pytest.mark.parametrize("name", ["llama-gqa", "gpt-neox", "bloom"])
def test_base_model_of_a_language_model(name: str, tmp_path: Path) -> None:
    model, batch = pruned(name)
    clover.save(model, tmp_path / "model")
    base = AutoModel.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(outputs(base, batch), outputs(model.base_model, batch))


@pytest.mark.parametrize("name", ["llama-gqa", "gpt-neox"])
def test_a_base_model_on_its_own(name: str, tmp_path: Path) -> None:
    """Out of the folder of a language model it comes by the names that it has there; then they are its own."""
    whole = pruned(name)[0]
    type(AutoModel.from_config(whole.config))(whole.config)  # of which the plan stays as it is
    base = AutoModel.from_pretrained(clover.save(whole, tmp_path / "model"))
    assert clover.summary(base)["vo_removed"] > 0.2
    assert all(base.get_submodule(block.name) for block in clover.plan_of(base).blocks)
    again = clover.load(clover.save(base, tmp_path / "base"))
    batch = build(name)[1]
    assert torch.equal(outputs(again, batch), outputs(base.eval(), batch))


@pytest.mark.parametrize("name", ["llama-gqa", "clip"])
def test_two_models_of_one_config(name: str, tmp_path: Path) -> None:
    """Pruning one changes nothing about the other, nor about the config that both were made from."""
    model, batch = build(name)
    config = model.config
    other = type(model)(config).to(torch.float64).eval()
    clover.prune(model, vo=0.3)
    assert type(config) is type(other.config) and not hasattr(config, "clover")
    assert outputs(clover.load(clover.save(other, tmp_path / "other")), batch).equal(outputs(other, batch))
    model.set_attn_implementation("eager")
    held = [m.config for m in model.modules() if hasattr(m, "config")]
    assert len(held) > 2 and {c._attn_implementation for c in held} == {"eager"}
    assert other.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_language_model_of_a_base_model(name: str, tmp_path: Path) -> None:
    """A head that the checkpoint lacks is a new one, as in transformers; the attention comes from the checkpoint."""
    model, batch = pruned(name)
    clover.save(model.base_model if name == "bert" else model, tmp_path / "model")
    wanted = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForSequenceClassification
    with torch.no_grad():
        loaded = wanted.from_pretrained(tmp_path / "model").eval().base_model(**batch).last_hidden_state
        assert torch.equal(loaded, model.base_model(**batch).last_hidden_state)


HEADS = ["SequenceClassification", "TokenClassification", "QuestionAnswering"]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mixtral"])
def test_a_head_whose_class_makes_its_base_from_the_same_config(family: str, head: str, tmp_path: Path) -> None:
    kind = getattr(transformers, f"{family}For{head}")
    config = kind.config_class(**LM, head_dim=8, num_key_value_heads=2)
    model, batch = kind(config).eval(), {"input_ids": torch.arange(1, 9).view(2, 4)}
    clover.prune(model, vo=0.25)
    for name in ("model", "again"):
        loaded = clover.load(clover.save(model, tmp_path / name))
        assert clover.summary(loaded) == clover.summary(model)
        assert torch.equal(loaded(**batch)[0], model(**batch)[0])
        model = loaded


@pytest.mark.parametrize("head", HEADS[:2])
def test_a_new_head_for_a_language_model(head: str, tmp_path: Path) -> None:
    model, batch = pruned("llama-gqa")
    auto = getattr(transformers, f"AutoModelFor{head}")
    loaded = auto.from_pretrained(clover.save(model, tmp_path / "model"), num_labels=3).eval()
    assert torch.equal(outputs(loaded.base_model, batch), outputs(model.base_model, batch))


def test_config_describes_itself(saved: Path) -> None:
    config = json.loads((saved / "llama-gqa/config.json").read_text())
    assert config["base_model_type"] == "llama"
    assert config["hidden_size"] == 48 and config["num_attention_heads"] == 6
    block = config["clover"]["blocks"][0]
    assert block["name"] == "model.layers.0.self_attn" and block["groups"]
    assert AutoConfig.from_pretrained(saved / "llama-gqa").model_type == "llama"


def test_dtype_is_kept(tmp_path: Path) -> None:
    model, _ = pruned("gpt2", dtype=torch.bfloat16)
    clover.save(model, tmp_path / "model")
    assert clover.load(tmp_path / "model").dtype == torch.bfloat16
    assert clover.load(tmp_path / "model", dtype=torch.float32).dtype == torch.float32


def test_what_lies_beside_is_saved(tmp_path: Path) -> None:
    model, _ = pruned("vit")
    clover.save(model, tmp_path / "deep/model", beside=(transformers.GenerationConfig(max_new_tokens=3),))
    assert json.loads((tmp_path / "deep/model/generation_config.json").read_text())["max_new_tokens"] == 3


def test_load_takes_models_that_were_never_cut(tmp_path: Path) -> None:
    model, batch = build("gpt2")
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(clover.load(tmp_path), batch), outputs(model, batch))


# --- new processes ---


def test_round_trip_into_a_new_process(saved: Path) -> None:
    code = """
import sys, torch, clover
from pathlib import Path
from families import outputs
for name in sys.argv[2:]:
    batch, truth = torch.load(Path(sys.argv[1]) / f"{name}.pt")
    model = clover.load(Path(sys.argv[1]) / name)
    torch.testing.assert_close(outputs(model, batch), truth, atol=1e-9, rtol=0)
    if hasattr(model, "generate") and "input_ids" in batch and name != "clip" and name != "bert":
        args = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(**batch, **args), model.generate(**batch, **args, use_cache=False))
    print(name)
"""
    done = python(code, saved, *NEW_PROCESS)
    assert done.stdout.split() == NEW_PROCESS, done.stderr[-3000:]


def test_without_clover_it_says_what_to_do(saved: Path) -> None:
    code = """
import sys, transformers
for kind in sys.argv[2:]:
    try:
        getattr(transformers, kind).from_pretrained(sys.argv[1])
    except Exception as error:
        assert "clover" not in sys.modules
        print(kind, "refused:", str(error).replace("\\n", " "))
    else:
        print(kind, "ran")
"""
    kinds = ["AutoModelForCausalLM", "AutoModel", "AutoConfig", "LlamaForCausalLM", "LlamaModel"]
    done = python(code, saved / "llama-gqa", *kinds)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == kinds, done.stderr[-3000:]
    for line in lines:
        assert "refused" in line and "import clover" in line and "pip install clover-attention" in line


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_while_saving_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    code = """
import os, signal, sys
import transformers.modeling_utils as m, clover
from families import pruned
def half(tensors, file, *args, **kwargs):
    open(file, "wb").write(b"half of a file")
    os.kill(os.getpid(), signal.SIGKILL)
m.safe_save_file = half
clover.save(pruned("gpt2")[0], sys.argv[1])
"""
    done = python(code, tmp_path / "model")
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert not (tmp_path / "model").exists()
    left = list(tmp_path.iterdir())  # a hidden draft at most, which holds up nobody
    assert all(f.name.startswith(".model.") for f in left)
    assert any(f.read_bytes() == b"half of a file" for f in tmp_path.rglob("*.safetensors"))
    model, batch = pruned("gpt2")
    clover.save(model, tmp_path / "model")
    assert torch.equal(outputs(clover.load(tmp_path / "model"), batch), outputs(model, batch))


# --- checkpoints that contradict themselves ---


def _other_value(config: dict[str, Any]) -> None:
    config["clover"]["blocks"][0]["groups"][0]["value"] -= 1


def _other_qk(config: dict[str, Any]) -> None:
    config["clover"]["blocks"][1]["groups"][0]["pairs" if config["base_model_type"] == "llama" else "plain"] -= 1


def _other_heads(config: dict[str, Any]) -> None:
    for key in ("num_key_value_heads", "n_head", "num_attention_heads"):
        if key in config:
            config[key] = 3


def _other_block(config: dict[str, Any]) -> None:
    block = config["clover"]["blocks"][0]
    block["name"] = block["name"].replace("0", "7")


def _fewer_blocks(config: dict[str, Any]) -> None:
    config["clover"]["blocks"] = config["clover"]["blocks"][1:]


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "bert"])
@pytest.mark.parametrize("change", [_other_value, _other_qk, _other_heads, _other_block, _fewer_blocks])
def test_plan_that_contradicts_the_tensors(name: str, change: Any, tmp_path: Path) -> None:
    model, _ = build(name)
    clover.save(clover.orthogonalize(model), tmp_path / "model")  # full rank: shapes alone give nothing away
    edit(tmp_path / "model", change)
    with pytest.raises(CloverError, match=r"contradict|restore config\.json"):
        clover.load(tmp_path / "model")


def test_a_tensor_that_a_dense_model_lacks_is_told(tmp_path: Path) -> None:
    model, _ = build("llama-gqa", torch.float32)
    weights = model.state_dict()
    for lost in ("model.norm.weight", "lm_head.weight"):
        del weights[lost]
    model.save_pretrained(tmp_path / "model", state_dict=weights)
    with pytest.warns(UserWarning, match=r"model lacks lm_head.weight, model.norm.weight, which hold random numbers"):
        clover.load(tmp_path / "model")


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "bert"])
def test_tensor_that_is_missing(name: str, tmp_path: Path) -> None:
    model, _ = pruned(name)
    clover.save(model, tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    tensors = safetensors.torch.load_file(file)
    gone = next(k for k in tensors if k.endswith("qkv_proj.weight"))
    del tensors[gone]
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CloverError, match=f"contradict the plan.*{gone} is missing"):
        clover.load(tmp_path / "model")


def _no_blocks(config: dict[str, Any]) -> None:
    del config["clover"]["blocks"]


def _no_groups(config: dict[str, Any]) -> None:
    del config["clover"]["blocks"][0]["groups"]


def _unknown_field(config: dict[str, Any]) -> None:
    config["clover"]["blocks"][0]["colour"] = "blue"


def _twice_the_same_head(config: dict[str, Any]) -> None:
    group = config["clover"]["blocks"][0]["groups"][0]
    group["heads"] = [*group["heads"], group["heads"][0]]


def _word_for_a_number(config: dict[str, Any]) -> None:
    config["clover"]["blocks"][0]["groups"][0]["value"] = "many"


def _no_plan(config: dict[str, Any]) -> None:
    del config["clover"]


def _unknown_base(config: dict[str, Any]) -> None:
    config["base_model_type"] = "nonsense"


def _list_for_a_plan(config: dict[str, Any]) -> None:
    config["clover"] = [1]


def _list_for_a_base(config: dict[str, Any]) -> None:
    config["base_model_type"] = []


def _dtype_of_no_kind(config: dict[str, Any]) -> None:
    config["dtype"] = "float99"


def _part_that_sees_all(config: dict[str, Any]) -> None:
    for block in config["clover"]["blocks"]:
        block["part"] = "encoder"


def _part_that_is_none(config: dict[str, Any]) -> None:
    config["clover"]["blocks"][1]["part"] = "banana"


def _class_of_another_family(config: dict[str, Any]) -> None:
    config["architectures"] = ["BertModel"]


def _class_that_is_no_model(config: dict[str, Any]) -> None:
    config["architectures"] = ["LlamaConfig"]


def _no_class(config: dict[str, Any]) -> None:
    del config["architectures"]


def _class_that_is_unknown(config: dict[str, Any]) -> None:
    config["architectures"] = ["Nonsense"]


def _number_for_a_class(config: dict[str, Any]) -> None:
    config["architectures"] = [5]


DAMAGE = [
    _no_blocks,
    _no_groups,
    _unknown_field,
    _twice_the_same_head,
    _word_for_a_number,
    _no_plan,
    _unknown_base,
    _list_for_a_plan,
    _list_for_a_base,
    _dtype_of_no_kind,
    _part_that_sees_all,
    _part_that_is_none,
    _class_of_another_family,
    _class_that_is_no_model,
    _number_for_a_class,
    _no_class,
    _class_that_is_unknown,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_plan(damage: Any, tmp_path: Path) -> None:
    model, _ = pruned("llama-gqa")
    clover.save(model, tmp_path / "model")
    edit(tmp_path / "model", damage)
    with pytest.raises(CloverError, match="restore"):
        clover.load(tmp_path / "model")


def _nonsense(name: str) -> Any:
    return lambda config: config.update({name: "nonsense"})


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "hidden_act", "rope_parameters"])
def test_damaged_config(name: str, tmp_path: Path) -> None:
    build("llama-gqa")[0].save_pretrained(tmp_path)
    edit(tmp_path, _nonsense(name))
    with pytest.raises(CloverError, match=r"can.t be loaded|no model that can be loaded"):
        clover.load(tmp_path)


@pytest.mark.parametrize("named", [None, ["Nonsense"]])
def test_no_class_is_named(named: Any, tmp_path: Path) -> None:
    """Then the head, if there was one, is left out, and must not be missed without a word."""
    clover.save(build("llama-gqa")[0], tmp_path / "m")
    edit(tmp_path / "m", lambda config: config.update(architectures=named))
    with pytest.warns(UserWarning, match=r"architecture.*loaded as AutoModel, and a head .* is left out"):
        model = clover.load(tmp_path / "m")
    assert type(model) is transformers.LlamaModel


def test_what_happened_when_loading(tmp_path: Path) -> None:
    clover.save(pruned("gpt2")[0], tmp_path / "m")
    loaded = clover.load(tmp_path / "m", output_loading_info=True)
    assert not loaded[0].training and "missing_keys" in loaded[1]


def test_a_config_is_made_anew_from_what_it_says() -> None:
    config = pruned("llama-gqa")[0].config
    again = type(config).from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict() and again.clover == config.clover


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(CloverError, match="nowhere"):
        clover.load(tmp_path / "nowhere")
    with pytest.raises(CloverError, match="no model that can be loaded"):
        clover.load(tmp_path)


def test_half_a_file(tmp_path: Path) -> None:
    model, _ = pruned("gpt2")
    clover.save(model, tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CloverError, match="can't be loaded"):
        clover.load(tmp_path / "model")


def test_a_tokenizer_of_several_chat_templates_is_saved(tmp_path: Path) -> None:
    """transformers puts them into a folder of their own."""
    model, _ = pruned("llama-gqa")
    made = tokenizer()
    made.chat_template = {"default": "a", "tool_use": "b"}
    folder = clover.save(model, tmp_path / "m", beside=(made,))
    assert AutoTokenizer.from_pretrained(folder).chat_template == made.chat_template


def test_a_frozen_model_stays_frozen() -> None:
    model, batch = build("bert")
    model.requires_grad_(False)
    clover.prune(model, vo=0.3, calibration=[batch])
    assert not any(p.requires_grad for p in model.parameters())


def test_the_spellings_of_whisper_are_saved_with_it(tmp_path: Path) -> None:
    processor = whisper_processor()
    processor.tokenizer.english_spelling_normalizer = {"colour": "color"}
    clover.save(build("whisper", torch.float32)[0], tmp_path / "m", beside=(processor,))
    assert json.loads((tmp_path / "m/normalizer.json").read_text()) == {"colour": "color"}


def test_nothing_is_made_of_a_folder_that_is_only_asked_for(tmp_path: Path) -> None:
    assert check_writable(tmp_path / "a/b/c") == tmp_path / "a/b/c" and not (tmp_path / "a").exists()
    clover.save(build("gpt2", torch.float32)[0], tmp_path / "a/b/c")
    assert (tmp_path / "a/b/c/config.json").exists()
