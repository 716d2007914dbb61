"""Pareto plots: ``python benchmarks/plots.py`` writes docs/frontier-MODEL.svg from the results of frontier.py."""

from __future__ import annotations

import json
from collections import defaultdict

from common import RESULTS, ROOT

TITLES = {
    "clover": "this project", "clover-weights": "CLOVER, weights only", "a3": "A3", "modegpt": "MoDeGPT",
    "kq-svd": "KQ-SVD", "palu": "Palu", "svd-llm": "SVD-LLM", "slicegpt": "SliceGPT", "flap": "FLAP",
    "wanda-sp": "Wanda-sp", "norms": "norm pruning",
}  # fmt: skip
MODELS = {
    "smollm2": "SmolLM2-135M-Instruct, WikiText-2", "gemma3": "Gemma 3 270M, WikiText-2",
    "whisper-encoder": "Whisper-base, encoder",
    "whisper-decoder": "Whisper-base, decoder", "whisper-cross": "Whisper-base, cross-attention",
    "minilm": "all-MiniLM-L6-v2", "smollm2-choice": "SmolLM2-135M-Instruct, eight commonsense sets",
}  # fmt: skip
AXES = {"perplexity": "perplexity", "wer": "word error rate, %", "cosine": "cosine to dense", "choice": "right answers"}
LARGEST = {"perplexity": 20.0, "wer": 25.0}
"""Nothing above this many times the dense value is drawn (word errors: the dense value and so many points)."""


def frontier() -> dict[str, dict[str, list[dict]]]:
    """Results by model and method, by share removed; the dense one under ``dense``."""
    found: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(RESULTS.glob("frontier-*.json")):
        result = json.loads(path.read_text())["result"]
        found[result["model"]][result["method"]].append(result)
    for methods in found.values():
        for rows in methods.values():
            rows.sort(key=lambda row: row["removed"])
    return found


def draw(model: str, methods: dict[str, list[dict]]) -> None:
    """Quality over what is left of the cache and of the attention's parameters."""
    from matplotlib import pyplot  # not at the top: the tables read the names above and draw nothing

    pyplot.rcParams["svg.hashsalt"] = "clover"  # equal results make equal files
    dense = methods["dense"][0]
    task, worst = dense["task"], LARGEST.get(dense["task"])
    top = None if worst is None else dense["value"] + worst if task == "wer" else dense["value"] * worst
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    for panel, size, label in zip(
        panels, ("cache_left", "attention_parameters_left"), ("cached keys and values", "attention parameters"),
        strict=True,
    ):  # fmt: skip
        panel.axhline(dense["value"], color="0.6", linestyle=":", label="dense")
        for method, title in TITLES.items():
            rows = [r for r in methods.get(method, []) if top is None or r["value"] <= top]
            ours = method == "clover"
            style = {"color": "black", "linewidth": 2.5, "zorder": 5} if ours else {"linewidth": 1.2}
            panel.plot(
                [100 * r[size] for r in rows], [r["value"] for r in rows], "o-", markersize=4, label=title, **style
            )
        panel.set_xlabel(f"{label} left, %")
        panel.invert_xaxis()
        panel.grid(alpha=0.2)
        if task == "perplexity":
            panel.set_yscale("log")
    panels[0].set_ylabel(AXES[task])
    panels[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(MODELS[model], fontsize=11)
    figure.savefig(ROOT / "docs" / f"frontier-{model}.svg", metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    for name, found in frontier().items():
        if "dense" in found:
            draw(name, found)
