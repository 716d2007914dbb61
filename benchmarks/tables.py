"""From the result files to tables: writes docs/results.md and the block between the ``results`` marks of README.md.

    python benchmarks/tables.py

Runs any number of times to the same end. Measurements that have no result file yet have no table.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable

from common import RESULTS, ROOT
from plots import AXES
from plots import MODELS as PLOTTED
from plots import TITLES as ARMS

Results = dict[str, dict]
"""Result files by name."""
MARKS = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.DOTALL)
CUTS = {"vo25": "V-O 25 %", "vo50": "V-O 50 %", "qk25": "Q-K 25 %", "qk50": "Q-K 50 %",
        "both25": "Q-K and V-O 25 %", "both50": "Q-K and V-O 50 %"}  # fmt: skip


def table(header: str, rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; the columns of ``header`` are separated by bars."""
    columns = [c.strip() for c in header.split("|")]
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def mib(count: float) -> str:
    return f"{count / 2**20:.2f} MiB"


def language(results: Results, kind: str = "language") -> str:
    dense = results[f"{kind}-dense"]["result"]
    rows = [["none", f"{dense['value']:.2f}", "", "", ""]]
    for name, cut in CUTS.items():
        if entry := results.get(f"{kind}-{name}"):
            r = entry["result"]
            left = (r[f"{k}_after"] / r[f"{k}_before"] for k in ("attention_parameters", "kv_bytes_per_token"))
            rows.append([cut, f"{r['value']:.2f}", f"{r['value'] / dense['value']:.3f}", *map(percent, left)])
    if len(rows) == 1:
        raise KeyError(f"{kind}-vo25")  # the dense model alone is no result
    p = dense["protocol"]
    about = (
        f"SmolLM2-135M-Instruct on WikiText-2 test ({p['scored']:,} tokens, windows of {p['window']}), no training. "
        "The last two columns say what is left."
    )
    return f"{about}\n\n{table('Cut | Perplexity | over dense | attention parameters | KV-cache', rows)}"


def speech(results: Results) -> str:
    dense = results["speech-dense"]["result"]
    arms = {"vanilla": "norm pruning", "weights": "CLOVER, weights only", "calibrated": "CLOVER, calibrated"}
    found = {title: results[f"speech-{arm}"]["result"] for arm, title in arms.items() if f"speech-{arm}" in results}
    shares = [(r["qk"], r["vo"]) for r in next(iter(found.values()), [])]
    rows: list[list[str]] = [["none", *[f"{dense['value']:.2f}"] * len(found)]]
    for i, (qk, vo) in enumerate(shares):
        rows.append([f"Q-K {percent(qk, 2)}, V-O {percent(vo, 2)}", *(f"{r[i]['value']:.2f}" for r in found.values())])
    p = dense["protocol"]
    about = (
        f"Encoder of Whisper-base, word error rate in percent on {p['utterances']} LJSpeech utterances "
        f"({p['words']} words, so one word is {100 / p['words']:.2f}), no training."
    )
    return f"{about}\n\n{table(' | '.join(['Cut', *found]), rows)}"


def speech_parts(results: Results) -> str:
    dense = results["speech-dense"]["result"]["value"]
    removed = ("qk_removed", "vo_removed")
    rules = {
        "decoder": lambda r: "decoder",
        "cross": lambda r: "cross-attention",
        "thresholds": lambda r: f"encoder, norm product <= {r['qk_threshold']:g} (Q-K), {r['vo_threshold']:g} (V-O)",
    }
    rows = [
        [rule(r), *(percent(r[k], 2) for k in removed), f"{r['value']:.2f}", f"{r['value'] - dense:+.2f}"]
        for name, rule in rules.items()
        for r in results.get(f"speech-{name}", {}).get("result", [])
    ]
    if not rows:
        raise KeyError("speech-decoder")
    about = "Whisper-base: decoder and cross-attention, calibrated; the paper's threshold rule, weights only."
    return f"{about}\n\n{table('Part | Q-K removed | V-O removed | WER | over dense', rows)}"


def embedding(results: Results) -> str:
    found = {cut: _result(results, f"embedding-{name}") for name, cut in CUTS.items()}
    found = {cut: result for cut, result in found.items() if result}
    if not found:
        raise KeyError("embedding-both25")
    items = next(iter(found.values()))["calibrated"]["protocol"]["items"]
    about = f"all-MiniLM-L6-v2, cosine to the dense embeddings, mean over {items} paragraphs of WikiText-2 test."
    rows = [[cut, f"{r['calibrated']['value']:.4f}", f"{r['weights']['value']:.4f}"] for cut, r in found.items()]
    return f"{about}\n\n{table('Cut | calibrated | weights only', rows)}"


def speed(results: Results) -> str:
    runs = [(f"SmolLM2, context {c}", run) for c, run in _result(results, "speed-smollm2").get("contexts", {}).items()]
    if "speed-encoder" in results:
        runs.append(("Whisper-base encoder", _result(results, "speed-encoder")["throughput"]))
    rows = []
    for title, run in runs:
        for key, dense in run["dense"].items():
            what = key.removesuffix("_per_second").replace("_", " ")
            for cut, ratio in run["ratio"].items():
                rows.append([f"{title}, {what}/s", cut, f"{dense:.4g}", f"{run[cut][key]:.4g}", f"{ratio[key]:.2f}"])
    if not rows:
        raise KeyError("speed-smollm2")
    about = "Batch 1, float32, the models in turns in one process, medians."
    return f"{about}\n\n{table('What | removed | dense | pruned | ratio', rows)}"


def decode(results: Results) -> str:
    rows = [
        [f"{r['context']:,}", str(r["batch"]), *(f"{r[k]:.3g}" for k in ("dense", "50 %", "ratio", "bound"))]
        for r in _result(results, "decode-contexts").get("rows", [])
    ]
    if not rows:
        raise KeyError("decode-contexts")
    about = (
        "Tokens a second that SmolLM2 writes behind a context, Q-K and V-O cut by 50 %, float32. The bound is what "
        "bytes alone allow: weights and cache of the dense model over those of the pruned one. The ratio exceeds it "
        "since transformers' default cache copies all keys and values for each token, and a pruned model's grows in "
        "place."
    )
    parts = [f"{about}\n\n{table('Context | batch | dense | pruned | ratio | bound', rows)}"]
    swept = {
        f"SmolLM2 at a context of {c}": run for c, run in _result(results, "decode-sweep").get("contexts", {}).items()
    }
    coded = _result(results, "decode-encoder")
    for title, run in (swept | ({"Encoder of Whisper-base": coded["throughput"]} if coded else {})).items():
        bound = coded["bound"] if run is coded.get("throughput") else {}
        keys = list(run["dense"])
        header = ["Removed", *(k.removesuffix("_per_second").replace("_", " ") for k in keys)]
        header += ["bound of multiply-adds"] if bound else []
        body = [
            [cut, *(f"{r[k]:.2f}" for k in keys), *([f"{bound[cut]:.2f}"] if bound else [])]
            for cut, r in run["ratio"].items()
        ]
        parts.append(f"{title}, speed over dense.\n\n{table(' | '.join(header), body)}")
    return "\n\n".join(parts)


def memory(results: Results) -> str:
    r = results["speed-memory"]["result"]
    names = {"file_bytes": "parameters on disk", "cache_bytes": "KV-cache", "peak_rss_bytes": "peak memory"}
    rows = [
        [title, cut, mib(r["dense"]["measured"][key]), mib(r[cut]["measured"][key]), *map(mib, r[cut]["saved"][key])]
        for key, title in names.items()
        for cut in r
        if isinstance(r[cut], dict) and cut != "dense"
    ]
    about = (
        f"SmolLM2 after reading {r['tokens']} tokens, {r['dtype']}, each model in a process of its own; "
        "peak memory is counted above the process before it loads the model."
    )
    return f"{about}\n\n{table('What | removed | dense | pruned | saved | saved by the plan', rows)}"


def decomposition(results: Results) -> str:
    r = results["decompose-layer"]["result"]
    seconds, errors = r["seconds"], r["error"]
    rows = [
        [title, f"{seconds[key]:.3g}", f"{seconds['svd_lowrank'] / seconds[key]:.3g}", arm and f"{errors[arm]:.1e}"]
        for title, key, arm in (
            ("this project: bases", "find", ""),
            ("this project: bases and new weights", "rewrite", "this_project"),
            (f"`torch.svd_lowrank`, {r['iterations']} iterations", "svd_lowrank", "svd_lowrank"),
            ("`torch.linalg.svd`, extrapolated", "full_svd", "full_svd"),
        )
    ]
    about = (
        f"One layer of LLaMA-2-7B's shape (width {r['width']}, {r['heads']} heads of {r['head_size']}), Q-K and V-O, "
        f"{r['dtype']}. Full SVD: {r['full_svd_method']}."
    )
    parts = [f"{about}\n\n{table('Method | seconds | times faster than `svd_lowrank` | relative error', rows)}"]
    if "decompose-whisper" in results:
        w = results["decompose-whisper"]["result"]
        parts.append(
            f"A whole model of Whisper-large-v3's sizes ({w['parameters']:,} parameters, {w['dtype']}) is "
            f"orthogonalised in {w['seconds']:.0f} s; memory peaks at {w['peak_bytes'] / 2**30:.1f} GiB, "
            f"{w['extra_bytes'] / 2**30:.1f} GiB more than the process holds before."
        )
    return "\n\n".join(parts)


METHODS = {"clover": "CLOVER", "lora": "LoRA", "dora": "DoRA", "pissa": "PiSSA"}


def commonsense(results: Results, profile: str = "smollm2-short") -> str:
    r = results[f"commonsense-{profile}"]["result"]
    base, p = r["base"], r["profile"]
    rows = [["untuned", "", "", f"{base['mean']:.2f}", "", f"{base['forgetting']['value']:.2f}"]]
    for key, title in METHODS.items():
        m = r[key]
        score = [f"{m['mean']:.2f}", f"{m['standard_error']:.2f}", f"{m['perplexity']:.2f}"]
        rows.append([title, f"{m['trainable_parameters']:,}", f"{m['lr']:g}", *score])
    about = (
        f"SmolLM2-135M-Instruct tuned for {p['steps']} steps of {p['batch']} examples of the commonsense mixture, "
        f"{len(p['seeds'])} seeds; {p['test_questions']} test questions of each of the eight sets, scored by "
        f"{p['score']} of the {p.get('candidates', 'labels')}. Perplexity: WikiText-2, to see what was forgotten."
    )
    header = "Method | parameters | learning rate | mean of eight sets | standard error | perplexity"
    ours = r["clover"]
    gaps = ", ".join(
        f"{ours['mean'] - r[key]['mean']:+.2f} over {METHODS[key]} "
        f"(+- {math.hypot(ours['standard_error'], r[key]['standard_error']):.2f})"
        for key in ("lora", "dora")
    )
    verdict = f"CLOVER's mean is {gaps}; the paper's figures for LLaMA-2-7B are +5.4 and +4.4."
    if base["mean"] >= max(r[key]["mean"] for key in METHODS):
        verdict += " The untuned model is as good: the steps were too few to learn the sets; this ranks nobody."
    return f"{about}\n\n{table(header, rows)}\n\n{verdict}"


def tuning_cost(results: Results) -> str:
    r = results["tuning-steps"]["result"]
    shapes = [key for key in r if " x " in key]
    rows = [
        [title, f"{r['trainable_parameters'][key]:,}"]
        + [f"{r[shape][key][what]:.3f}" for shape in shapes for what in ("time_over_lora", "memory_over_lora")]
        for key, title in METHODS.items()
    ]
    titles = [f"{what}, {shape}" for shape in shapes for what in ("time", "saved activations")]
    for shape, found in _result(results, "tuning-memory").items():
        if shape in shapes:
            titles.append(f"peak memory, {shape}")
            for row, key in zip(rows, METHODS, strict=True):
                row.append(f"{found[key]['over_lora']:.3f}")
    about = (
        "A training step of SmolLM2 on the same modules, over LoRA's; batch x tokens, float32, methods in turns (peak "
        "memory: all that a process of its own holds, weights included)."
    )
    text = f"{about}\n\n{table(' | '.join(['Method', 'parameters', *titles]), rows)}"
    if start := _result(results, "tuning-start"):
        text += (
            f"\n\nThe cores of SmolLM2 are made in {start['smollm2_seconds']:.1f} s, those of a model of LLaMA-2-7B's "
            f"shape in {start['llama_2_7b_seconds']:.0f} s ({start['llama_2_7b']})."
        )
    return text


def healing(results: Results) -> str:
    arms = {
        "cores": "CLOVER's cores of the attention", "cores-mlp": "CLOVER's cores of attention and MLP",
        "lora": "LoRA on the attention", "lora-mlp": "LoRA on attention and MLP", "attention": "all attention weights",
    }  # fmt: skip
    rows = []
    for key, title in arms.items():
        for suffix, loss in (("", "text"), ("-distil", "dense model")):
            if r := _result(results, f"healing-{key}{suffix}"):
                rows.append(
                    [title, loss, f"{r['trainable_parameters']:,}", f"{r['healed']:.2f}", f"{r['over_dense']:.3f}"]
                )
    if not rows:
        raise KeyError("healing-cores")
    r = results["healing-cores"]["result"]
    about = (
        f"SmolLM2 with 50 % of Q-K and V-O removed (perplexity {r['pruned']:.2f}, dense {r['dense']:.2f}), then "
        f"trained on {r['tokens']:,} tokens of WikiText-2 train; the first {r['protocol']['tokens']:,} of test."
    )
    return f"{about}\n\n{table('Trained | loss from | parameters | perplexity | over dense', rows)}"


def healing_speech(results: Results) -> str:
    start = results["healing-speech-start"]["result"]
    arms = {
        "cores": "CLOVER's cores of the attention", "cores-mlp": "CLOVER's cores of attention and MLP",
        "lora": "LoRA on the attention", "attention": "all attention weights",
    }  # fmt: skip
    rows = [["nothing (dense)", "", "", f"{start['dense']['wer']:.2f}", "0"]]
    rows.append(["nothing (cut)", "", "", f"{start['pruned']['wer']:.2f}", f"{start['pruned']['encoder_error']:.3f}"])
    r: dict = {}
    for arm, title in arms.items():
        for suffix, loss in (("", "transcripts"), ("-distil", "dense encoder")):
            if found := _result(results, f"healing-speech-{arm}{suffix}"):
                r = found
                rows.append(
                    [title, loss, f"{r['trainable_parameters']:,}", f"{r['wer']:.2f}", f"{r['encoder_error']:.3f}"]
                )
    if not r:
        raise KeyError("healing-speech-cores")
    about = (
        f"The encoder of Whisper-base with {percent(r['qk_removed'], 0)} of Q-K and {percent(r['vo_removed'], 0)} of "
        f"V-O removed, then trained for {r['steps']} steps of {r['batch']} LJSpeech clips; scored on "
        f"{r['protocol']['utterances']} others. Encoder error: relative, to the dense encoder's output."
    )
    return f"{about}\n\n{table('Trained | loss from | parameters | WER | encoder error', rows)}"


def loss_rank(results: Results) -> str:
    """Foretold, measured and true loss of cuts; foretold prices are gauged at 25 % of either kind."""
    r = results["loss-rank"]["result"]
    points = sorted(r["points"], key=lambda p: p["true"])
    single = {k: next(p for p in points if p[k] == 0.25 and p["qk"] + p["vo"] == 0.25) for k in ("qk", "vo")}
    rates = {k: single[k]["measured"] / single[k][f"{k}_cost"] for k in single}
    for p in points:
        p["foretold"] = sum(rates[k] * p[f"{k}_cost"] for k in rates)
    told = [[p[k] for p in points] for k in ("foretold", "measured", "true")]
    about = (
        f"SmolLM2-135M-Instruct, {len(points)} cuts: relative increase of perplexity, foretold, "
        "measured as divergence on data kept out of the calibration, and in truth "
        "on the first 24,576 tokens of WikiText-2 test. Spearman's rank "
        f"correlation with the truth: foretold {spearman(told[0], told[2]):.3f}, "
        f"measured {spearman(told[1], told[2]):.3f}."
    )
    rows = [[percent(p["qk"]), percent(p["vo"]), *(percent(math.expm1(p[k])) for k in ("foretold", "measured", "true"))]
            for p in points]  # fmt: skip
    return f"{about}\n\n{table('Q-K removed | V-O removed | foretold | measured | true', rows)}"


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation of two lists without ties."""
    ranks = [[sorted(x).index(v) for v in x] for x in (a, b)]
    n = len(a)
    return 1 - 6 * sum((i - j) ** 2 for i, j in zip(*ranks, strict=True)) / (n * (n * n - 1))


def loss_bound(results: Results) -> str:
    runs = sorted(results["loss-bound"]["result"]["runs"], key=lambda r: r["max_loss"])
    rows = [[percent(r["max_loss"]), *(percent(r["chosen"][k]) for k in ("qk", "vo", "measured", "ceiling")),
             percent(r["true"]), len(r["measured"]), f"{r['seconds']:.0f}"] for r in runs if r["chosen"]]  # fmt: skip
    about = (
        "SmolLM2-135M-Instruct, `--max-loss`: what is delivered for a bound, and the true increase of perplexity "
        "on the first 24,576 tokens of WikiText-2 test (in bfloat16, as of the dense model)."
    )
    columns = (
        "Bound | Q-K removed | V-O removed | measured | with near certainty under | true | cuts measured | seconds"
    )
    return f"{about}\n\n{table(columns, rows)}"


def peft_suite(results: Results) -> str:
    r = results["peft-suite"]["result"]
    return (
        f"peft {r['peft']}'s own `{'` and `'.join(r['files'])}` with `CloverConfig` put into their cases: "
        f"{r['passed']} pass, {r['failed']} fail, {r['skipped']} are skipped."
    )


def streaming(results: Results) -> str:
    """From file to file: what was run whole, and what is arithmetic, said as such."""
    r = results["streaming-weights"]["result"]
    alone, streamed = r["alone"], r["streamed"]
    parts = ", ".join(f"{name} {alone[name]:.0f} s" for name in ("read", "decompose", "write", "cut"))
    lines = [
        f"A float16 checkpoint of LLaMA-2-7B's shape ({r['bytes_before'] / 1e9:.1f} GB, random weights), Q-K and V-O "
        f"25 %, by the weights: {streamed['seconds']:.0f} s, at most {streamed['peak_bytes'] / 2**30:.2f} GiB. "
        "Its parts alone: "
        f"{parts} ({r['alone_method']}); the whole takes {r['over_parts']:.2f} times reading, decomposing and writing, "
        f"{r['over_parts_with_cut']:.2f} times all four."
    ]
    if r := _result(results, "streaming-seventy"):
        lines.append(
            f"A block of LLaMA-2-70B's shape: at most {r['block']['peak_bytes'] / 2**30:.2f} GiB. The whole "
            f"model by arithmetic, not run: {r['by_arithmetic_total'] / 60:.0f} minutes ({r['method']})."
        )
    if r := _result(results, "streaming-calibrated"):
        lines.append(
            f"Calibrated on {r['sequences']} x {r['length']} tokens, {r['layers_run']} layers of LLaMA-2-7B's shape: "
            f"{r['seconds']:.0f} s, at most {r['peak_bytes'] / 2**30:.2f} GiB. The whole model by arithmetic, not run: "
            f"{r['whole_model_seconds'] / 60:.0f} minutes ({r['whole_model_method']})."
        )
    if r := _result(results, "streaming-whisper"):
        rows = [[n, f"{r[n]['seconds']:.0f}", f"{r[n]['peak_bytes'] / 2**30:.2f}"] for n in ("memory", "streamed")]
        said = r["streamed"]["said"]
        gone = 1 - said["parameters_after"] / said["parameters_before"]
        lines.append(
            f"Whisper-large-v3's sizes, float16, Q-K and V-O {percent(r['qk'], 0)}: {percent(gone)} of the "
            f"parameters go; the encoder runs at {r['encoder']['ratio']:.2f} of the dense "
            f"one's speed.\n\n{table('Way | seconds | peak GiB', rows)}"
        )
    if r := _result(results, "streaming-processes"):
        stages = {"weights": ("decompose", "cut"), "calibrated": ("moments", "find_basis", "refit")}
        rows = [
            [f"{kind}: {stage}", *(f"{run[stage]:.1f}" for run in r[kind]["runs"].values())]
            for kind, names in stages.items() for stage in names
        ]  # fmt: skip
        header = " | ".join(["Seconds, processes x threads", *r["weights"]["runs"]])
        largest = max(r[kind]["difference"]["processes"] for kind in stages)
        lines.append(
            f"Several processes; results differ by at most {largest:.1g} of a tensor.\n\n{table(header, rows)}"
        )
    return "\n\n".join(lines)


def streaming_quality(results: Results) -> str:
    rows = []
    for name, cut in CUTS.items():
        if r := _result(results, f"streaming-quality-{name}"):
            rows.append([cut, f"{r['memory']:.2f}", f"{r['streamed']:.2f}"])
    if not rows:
        raise KeyError("streaming-quality-vo25")
    about = (
        "SmolLM2-135M-Instruct, calibrated on 16 x 512 tokens; perplexity on the first 24,576 tokens of WikiText-2 "
        "test."
    )
    return f"{about}\n\n{table('Cut | in memory | streamed', rows)}"


def frontier(results: Results) -> str:
    """A table for each model: quality at every share removed, best first at a half, and what a half leaves."""
    runs: dict[str, dict[str, dict[float, dict]]] = {}
    for name in (n for n in results if n.startswith("frontier-")):
        r = results[name]["result"]
        runs.setdefault(r["model"], {}).setdefault(r["method"], {})[r["removed"]] = r
    parts = [_frontier_table(model, runs[model]) for model in PLOTTED if "dense" in runs.get(model, {})]
    if not parts:
        raise KeyError("frontier-smollm2-dense")
    about = (
        "Each share is removed from Q-K and V-O alike, without training. All methods saw the same calibration tokens "
        "and are evaluated by the same code; peers are written from their published equations, attention only, and may "
        "differ from their authors' code in details. What half leaves: "
        "of the cached numbers / of the attention's parameters. In bold: the best of the methods that shrink the cache."
    )
    return "\n\n".join([about, *parts])


def _frontier_table(model: str, methods: dict[str, dict[float, dict]]) -> str:
    dense = methods["dense"][0.0]
    less_is_better = dense["task"] in ("perplexity", "wer")
    shares = sorted({share for m, by in methods.items() if m != "dense" for share in by})
    digits = 4 if dense["task"] in ("cosine", "choice") else 2

    def caching(share: float) -> list[float]:
        found = (by[share] for m, by in methods.items() if m != "dense" and share in by)
        return [r["value"] for r in found if r["cache_left"] < 1]

    best = {share: (min if less_is_better else max)(caching(share), default=None) for share in shares}

    def cell(r: dict | None, share: float) -> str:
        if r is None:
            return ""
        text = f"{r['value']:.{digits}f}" if r["value"] < 1e5 else f"{r['value']:.0e}"
        return f"**{text}**" if r["value"] == best[share] and r["cache_left"] < 1 else text

    rows = []
    for method, title in ARMS.items():
        if by := methods.get(method):
            half = by.get(0.5)
            left = f"{percent(half['cache_left'], 0)} / {percent(half['attention_parameters_left'], 0)}" if half else ""
            rows.append([title, *(cell(by.get(share), share) for share in shares), left])
    header = " | ".join(["Method", *(percent(share) for share in shares), "half leaves"])
    title = f"{PLOTTED[model]}; {AXES[dense['task']]}, dense {dense['value']:.{digits}f}"
    return f"### {title}\n\n{table(header, rows)}\n\n![{PLOTTED[model]}](frontier-{model}.svg)"


Section = Callable[[Results], str]
QUICK = "language-first-24576"
SECTIONS: dict[str, tuple[Section, str]] = {
    "Language": (language, "language-(dense|vo|qk|both)"),
    "Language, a quick look": (lambda results: language(results, QUICK), f"{QUICK}-"),
    "Speech": (speech, "speech-(dense|vanilla|weights|calibrated)"),
    "Speech: the other parts of the model": (speech_parts, "speech-(decoder|cross|thresholds)"),
    "Embeddings": (embedding, "embedding-"),
    "Frontier: this project and its peers": (frontier, "frontier-"),
    "Speed": (speed, "speed-(smollm2|encoder)"),
    "Long contexts": (decode, "decode-.*"),
    "Memory": (memory, "speed-memory"),
    "Decomposition": (decomposition, "decompose-"),
    "Streaming": (streaming, "streaming-(weights|seventy|calibrated|whisper|processes)"),
    "Streaming: quality": (streaming_quality, "streaming-quality-"),
    "Tuning: the cost of a step": (tuning_cost, "tuning-"),
    "Tuning: commonsense": (commonsense, "commonsense-smollm2-short"),
    "Tuning: commonsense, choices as texts": (lambda r: commonsense(r, "smollm2-texts"), "commonsense-smollm2-texts"),
    "Healing": (healing, "healing-(?!speech)"),
    "Healing of speech": (healing_speech, "healing-speech-"),
    "A budget of loss: what is foretold": (loss_rank, "loss-rank"),
    "A budget of loss: what is delivered": (loss_bound, "loss-bound"),
    "peft's tests": (peft_suite, "peft-suite"),
}
"""Title -> (what makes the section, pattern of the result files that it reads)."""
README = (
    "Language",
    "Speech",
    "Speed",
    "Decomposition",
    "Tuning: the cost of a step",
    "Healing",
)


def sections(results: Results) -> dict[str, str]:
    """The sections whose measurements were made, by title."""
    made = {}
    for title, (section, _) in SECTIONS.items():
        try:
            made[title] = section(results)
        except KeyError as missing:
            print(f"{title}: left out, for there is no {missing}", file=sys.stderr)
    return made


def provenance(results: Results, pattern: str) -> str:
    """The commands, machines and versions behind a section."""
    entries = [e for name, e in sorted(results.items()) if re.match(pattern, name)]
    versions = sorted({", ".join(f"{k} {v}" for k, v in e["versions"].items()) for e in entries})
    machines = sorted({f"{e['machine']['cpu']}, {e['machine']['threads']} threads" for e in entries})
    commands = ", ".join(f"`{c}`" for c in sorted({e["command"] for e in entries}))
    days = " to ".join(sorted({min(e["date"] for e in entries), max(e["date"] for e in entries)}))
    seeds = ", ".join(str(s) for s in sorted({e["seed"] for e in entries}))
    return f"Made by {commands} (seed {seeds}); {days}; {'; '.join(machines)}; {'; '.join(versions)}."


def main() -> None:
    results = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    made = sections(results)
    whole = [f"## {title}\n\n{body}\n\n{provenance(results, SECTIONS[title][1])}" for title, body in made.items()]
    head = (
        "# Results\n\nMade by `python benchmarks/tables.py` from `benchmarks/results`; "
        "[benchmarks.md](benchmarks.md) says how each is measured."
    )
    (ROOT / "docs" / "results.md").write_text("\n\n".join([head, *whole]) + "\n")
    readme = ROOT / "README.md"
    text = readme.read_text() if readme.exists() else ""
    if not MARKS.search(text):
        raise SystemExit(f"{readme} has no block between '<!-- results -->' and '<!-- /results -->'; add the two lines")
    block = "\n\n".join(f"**{title}.** {made[title]}" for title in README if title in made)
    readme.write_text(MARKS.sub(lambda marks: f"{marks[1]}{block}\n{marks[2]}", text))


def _result(results: Results, name: str) -> dict:
    return results.get(name, {}).get("result", {})


if __name__ == "__main__":
    main()
