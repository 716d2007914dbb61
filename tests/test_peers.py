"""The peers of benchmarks/frontier.py: harmless where nothing is cut, optimal where their papers say so."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from clover.model.survey import blocks
from clover.pruning.prune import find_bases
from families import build

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of a source distribution", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import facts  # noqa: E402
import frontier  # noqa: E402
import peers  # noqa: E402

CASES = ["llama-gqa", "gpt-neox", "whisper", "bert", "gpt2"]
LOSSLESS = sorted(set(peers.METHODS) - {"svd-llm", "palu", "slicegpt"})  # matched at a rank below full, or bounded


def measured(name: str) -> tuple[Any, dict[str, torch.Tensor], list[facts.Facts]]:
    model, batch = build(name)
    with facts.watching(model, blocks(model)) as found:
        find_bases(model, calibration=[batch])
    return model, batch, found


def output(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        out = model(**batch)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def written(model: Any, cuts: list[peers.Cut]) -> Any:
    model = copy.deepcopy(model)
    for block, cut in zip(blocks(model), cuts, strict=True):
        frontier.write(block, cut)
    return model


@pytest.mark.parametrize("case", CASES)
def test_nothing_removed_changes_nothing_and_half_changes_much(case: str) -> None:
    model, batch, found = measured(case)
    dense = output(model, batch)
    for name in LOSSLESS:
        same = output(written(model, peers.METHODS[name](found, 0.0)), batch)
        assert (same - dense).norm() < 1e-3 * dense.norm(), name
    for name in ("norms", "a3", "modegpt", "kq-svd", "flap", "wanda-sp"):
        other = output(written(model, peers.METHODS[name](found, 0.5)), batch)
        assert (other - dense).norm() > 1e-2 * dense.norm(), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", peers.METHODS)
def test_more_removed_is_never_larger(case: str, method: str) -> None:
    _, _, found = measured(case)
    sizes = []
    for share in (0.0, 0.25, 0.5, 0.75):
        cuts = peers.METHODS[method](found, share)
        sizes.append((sum(c.parameters for c in cuts), sum(c.cached for c in cuts)))
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] != sizes[0]


def test_facts_are_moments_of_what_the_model_computes() -> None:
    model, batch, found = measured("whisper")
    caught = []
    block = blocks(model)[0]
    handle = block.core.k_proj.register_forward_hook(lambda _, args, out: caught.append((args[0], out)))
    output(model, batch)
    handle.remove()
    x, k = (t.flatten(0, 1).double() for t in caught[0])
    torch.testing.assert_close(found[0].mean("source"), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    head = k[:, : block.heads().k.shape[1]]
    torch.testing.assert_close(found[0].mean("key")[0], head.T @ head / len(k), rtol=1e-4, atol=1e-5)


def test_the_svd_of_logits_is_best_for_logits() -> None:
    """Without rotation and for uncorrelated pairs of query and key, no map of that rank errs less than A3's."""
    _, _, found = measured("whisper")
    f = found[0]
    query, key = peers._grams(f)
    cut = peers.a3(found, 0.5)[0].heads
    rank = int(torch.linalg.matrix_rank(cut.k[0], rtol=1e-6))

    def error(maps: torch.Tensor) -> float:
        gone = torch.eye(maps.shape[-1], dtype=maps.dtype) - maps
        return float((query * (gone @ key @ gone.mT)).sum())

    best = peers._cut_product(query, key, rank)
    for seed in range(5):
        torch.manual_seed(seed)
        other = torch.linalg.qr(torch.randn_like(key))[0][..., :rank]
        assert error(best) <= error(other @ other.mT)
    assert error(best) <= error(torch.diag_embed((torch.arange(key.shape[-1]) < rank).double().expand(len(key), -1)))


def test_shares_by_influence_keep_their_mean_and_their_bound() -> None:
    shares = peers._allocate([0.01, 0.5, 0.02, 0.4], 0.6)
    assert sum(shares) / 4 == pytest.approx(0.6) and max(shares) <= 0.95
    assert shares[0] > shares[3] > shares[1]


@pytest.mark.parametrize("method", ["flap", "wanda-sp"])
def test_whole_heads_leave_their_mean_behind(method: str) -> None:
    _, _, found = measured("bert")
    for f, cut in zip(found, peers.METHODS[method](found, 0.5), strict=True):
        gone = (cut.heads.o == 0).flatten(2).all(-1)
        assert torch.equal(gone.all(1), gone.any(1)) and cut.heads.o_bias is not None
        mean = f.mean("output_mean").view(*f.heads.o.shape[:2], -1)
        before = torch.einsum("gnme,gne->m", f.heads.o, mean) + f.heads.o_bias
        after = torch.einsum("gnme,gne->m", cut.heads.o, mean) + cut.heads.o_bias
        torch.testing.assert_close(after, before)


def test_keys_mapped_behind_the_rotation() -> None:
    """Only there can a projection mix frequencies; written in front of it, the outputs differ."""
    model, batch, found = measured("llama-gqa")
    cuts = peers.kq_svd(found, 0.5)
    assert all(c.behind is not None and torch.linalg.matrix_rank(c.behind[0]) <= c.behind.shape[-1] // 2 for c in cuts)
    small = written(model, cuts)
    assert not torch.allclose(output(small, batch), output(model, batch), atol=1e-3)
    assert all(not hasattr(b.core, "behind") for b in blocks(model))


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_a_benchmark_finds_what_it_imports(name: str) -> None:
    """A change here is not to wait for their next run, which takes hours."""
    for library in {"quantise": ["torchao"], "runtimes": ["onnxruntime"], "commonsense": ["yaml"]}.get(name, []):
        pytest.importorskip(library)
    importlib.import_module(name)


def test_the_stages_that_streaming_times_are_there() -> None:
    for owner, attribute in importlib.import_module("streaming").STAGES.values():
        assert callable(getattr(owner, attribute))
