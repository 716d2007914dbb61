"""Classes that no row names, but whose code is that of one that a row names."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from transformers.models.llama.modeling_llama import LlamaAttention

import clover
from clover.errors import CloverError, UnsupportedModelError
from clover.model.alike import _files, alike, code
from clover.model.families import FAMILIES
from clover.model.survey import blocks
from families import outputs
from tiny import LAYERS, LM, VISION, causal, clip_like, encoder, gemma, granite_swa, image, pair, seamless, text, vision

BATCH = dict[str, torch.Tensor]
TWINS: dict[str, tuple[Callable[[], Any], Callable[[], BATCH]]] = {
    "Jais2Attention": (lambda: causal("Jais2"), text),
    "MarkupLMAttention": (lambda: encoder("MarkupLM", xpath_unit_hidden_size=8), text),
    "PixioAttention": (lambda: vision("Pixio"), image),
    "VaultGemmaAttention": (lambda: gemma("VaultGemma"), text),
    "CwmAttention": (lambda: causal("Cwm", head_dim=8, sliding_window=8, layer_types=LAYERS), text),
    "NemotronHAttention": (lambda: nemotron_h(), text),
    "Aimv2Attention": (lambda: t.Aimv2VisionModel(t.Aimv2VisionConfig(**VISION)), image),
    "BeitAttention": (lambda: vision("Beit"), image),
    "AltCLIPAttention": (lambda: clip_like("AltCLIP", project_dim=32), lambda: text() | image()),
    "GraniteMoeSWAAttention": (lambda: granite_swa("GraniteMoeSWA"), text),
    "SeamlessM4Tv2Attention": (lambda: seamless("SeamlessM4Tv2"), pair),
    "TimeSeriesTransformerAttention": (lambda: series_transformer(), lambda: series()),
}


def nemotron_h() -> Any:
    sizes = {k: v for k, v in LM.items() if k != "num_hidden_layers"} | {"head_dim": 8, "num_key_value_heads": 2}
    state = {"mamba_num_heads": 8, "mamba_head_dim": 12, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 4}
    kinds = ["mamba", "attention"]
    return t.NemotronHForCausalLM(t.NemotronHConfig(**sizes, **state, layers_block_type=kinds))


def series_transformer() -> Any:
    """An encoder-decoder: some of its blocks attend to another sequence."""
    times = {"context_length": 8, "prediction_length": 4, "lags_sequence": [1, 2], "num_time_features": 1}
    return t.TimeSeriesTransformerModel(t.TimeSeriesTransformerConfig(d_model=48, **times))


def series() -> BATCH:
    features = {"past_time_features": torch.randn(2, 10, 1), "future_time_features": torch.randn(2, 4, 1)}
    values = {"past_values": torch.randn(2, 10), "future_values": torch.randn(2, 4)}
    return features | values | {"past_observed_mask": torch.ones(2, 10)}


LINES = """
import torch
from torch import nn


def double(x):
    return 2 * x


class FirstAttention(nn.Module):
    '''Words that don't count.'''

    def __init__(self, size: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(size, size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return double(self.q_proj(hidden_states))
"""


@pytest.mark.usefixtures("exact_steps")
@pytest.mark.parametrize("kind", TWINS)
def test_a_class_without_a_row(kind: str, tmp_path: Path) -> None:
    assert kind not in FAMILIES
    make, batch = TWINS[kind]
    torch.manual_seed(1)
    model, given = make().double().eval(), batch()
    given = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    dense = outputs(model, given)
    assert kind in {type(block.module).__name__ for block in blocks(model)}
    assert (outputs(clover.orthogonalize(copy.deepcopy(model)), given) - dense).abs().max() < 1e-9
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".* tokens reached .*; give more data")
        clover.prune(model, qk=0.25, vo=0.25, calibration=[given])
    cut = outputs(model, given)
    assert not torch.equal(cut, dense)
    clover.save(model, tmp_path / "out")
    loaded = clover.load(tmp_path / "out", dtype=torch.float64)
    torch.testing.assert_close(outputs(loaded, given), cut, rtol=0, atol=1e-6)  # some constants went through float32


def test_a_model_with_one_class_that_is_no_twin() -> None:
    sizes = {"vocab_size": 60, "d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    model = t.LongT5ForConditionalGeneration(t.LongT5Config(**sizes, encoder_attention_type="local"))
    with pytest.raises(UnsupportedModelError, match="LongT5LayerLocalSelfAttention"):
        blocks(model)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"double(": "twice(", "First": "Second", "Words": "Others"}, True),
        ({": torch.Tensor": ""}, True),
        ({"2 * x": "3 * x"}, False),
        ({"(size, size)": "(size, size, bias=False)"}, True),
        ({"nn.Linear(": "double("}, False),
        ({"hidden_states: torch.Tensor)": "hidden_states: torch.Tensor = None)"}, True),
        ({"self.q_proj(": "(self.q_proj)("}, True),
        ({"hidden_states": "states"}, False),
    ],
    ids=["copy", "renamed", "annotations", "helper", "constructor", "part", "default", "brackets", "signature"],
)
def test_what_counts_as_the_same_code(tmp_path: Path, changes: dict[str, str], same: bool) -> None:
    digests = []
    for i, pairs in enumerate(({}, changes)):
        text = LINES
        for old, new in pairs.items():
            assert old in text
            text = text.replace(old, new)
        file = tmp_path / f"{i}.py"
        file.write_text(text)
        digests.append(code("SecondAttention" if "Second" in text else "FirstAttention", file))
    assert (digests[0] == digests[1]) == same


def test_rows_of_the_same_code_are_equal() -> None:
    """Else a class of that code would be read by whichever comes first."""
    files, rows = _files(), {}
    for name, family in FAMILIES.items():
        if name.endswith("Attention"):  # others are known by their names alone
            assert rows.setdefault(code(name, files[name]), family) == family, name


def test_another_sequence_is_not_taken_for_self_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = series_transformer(), series()
    monkeypatch.setattr("clover.model.survey.CROSS", set())
    with pytest.raises(CloverError, match="key_value_states"):
        outputs(clover.orthogonalize(model), batch)


def test_every_row_knows_its_own_class() -> None:
    """The files are found, and a class is its own twin."""
    assert alike(LlamaAttention, ("BartAttention", "LlamaAttention")) == "LlamaAttention"
    assert alike(LlamaAttention, ("BartAttention", "Qwen2Attention")) is None
    assert alike(type("LlamaAttention", (), {"__module__": "nowhere"}), ("LlamaAttention",)) is None
