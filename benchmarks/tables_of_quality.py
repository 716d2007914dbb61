"""Tables of what models can still do: language, speech, embeddings, peers, tuning and healing."""

from __future__ import annotations

import math
from typing import Any

from cells import CUTS, METHODS, Results, percent, result, table
from plots import AXES
from plots import MODELS as PLOTTED
from plots import TITLES as ARMS

LOSS_MODELS = {
    "smollm2": "SmolLM2", "gemma3": "Gemma 3", "minilm": "MiniLM", "whisper-encoder": "Whisper-base, encoder",
}  # fmt: skip


JOINED = {0: "clips alone", 1: "clips that fill windows", 2: "clips that fill windows in two orders"}
"""What an argument of ``calibration_batches`` means."""
LOSS = {
    "smollm2": "relative increase of perplexity, truth on the first 24,576 tokens of WikiText-2 test",
    "gemma3": "likewise on 8,192 tokens, V-O alone",
    "minilm": "relative squared error of the output, truth on windows of WikiText-2 test",
    "whisper-encoder": "divergence of what is written, truth on the test clips",
}  # fmt: skip


def language(results: Results) -> str:
    dense = results["language-dense"]["result"]
    rows = [["none", f"{dense['value']:.2f}", "", "", ""]]
    for name, cut in CUTS.items():
        if entry := results.get(f"language-{name}"):
            r = entry["result"]
            left = (r[f"{k}_after"] / r[f"{k}_before"] for k in ("attention_parameters", "kv_bytes_per_token"))
            rows.append([cut, f"{r['value']:.2f}", f"{r['value'] / dense['value']:.3f}", *map(percent, left)])
    if len(rows) == 1:
        raise KeyError("language-vo25")  # the dense model alone is no result
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
        "all": lambda r: "all three, one budget",
        "divided": lambda r: f"encoder, {percent(r['total'])} divided by what a cut of either loses, clips alone",
        "joined": lambda r: f"encoder, calibrated by {JOINED[r['joined']]}",
        "thresholds": lambda r: f"encoder, norm product <= {r['qk_threshold']:g} (Q-K), {r['vo_threshold']:g} (V-O)",
    }
    rows = [
        [rule(r), *(percent(r[k], 2) for k in removed), f"{r['value']:.2f}", f"{r['value'] - dense:+.2f}"]
        for name, rule in rules.items()
        for r in results.get(f"speech-{name}", {}).get("result", [])
    ]
    if not rows:
        raise KeyError("speech-decoder")
    about = (
        "Whisper-base: decoder, cross-attention and all three kinds together, calibrated; totals of the encoder "
        "divided between Q-K and V-O by "
        "the loss of calibration clips kept out; the paper's threshold rule, weights only."
    )
    return f"{about}\n\n{table('Part | Q-K removed | V-O removed | WER | over dense', rows)}"


def embedding(results: Results) -> str:
    found = {cut: result(results, f"embedding-{name}") for name, cut in CUTS.items()}
    found = {cut: result for cut, result in found.items() if result}
    if not found:
        raise KeyError("embedding-both25")
    items = next(iter(found.values()))["calibrated"]["protocol"]["items"]
    about = f"all-MiniLM-L6-v2, cosine to the dense embeddings, mean over {items} paragraphs of WikiText-2 test."
    rows = [[cut, f"{r['calibrated']['value']:.4f}", f"{r['weights']['value']:.4f}"] for cut, r in found.items()]
    return f"{about}\n\n{table('Cut | calibrated | weights only', rows)}"


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

    def judged(r: dict) -> float:
        return r.get("nats", r["value"])

    def caching(share: float) -> list[float]:
        found = (by[share] for m, by in methods.items() if m != "dense" and share in by)
        return [judged(r) for r in found if r["cache_left"] < 1]

    best = {share: (min if less_is_better else max)(caching(share), default=None) for share in shares}

    def cell(r: dict | None, share: float) -> str:
        if r is None:
            return ""
        text = f"{r['value']:.{digits}f}" if r["value"] < 1e5 else f"{r['value']:.0e}"
        text += f" ({r['nats']:.3f})" if "nats" in r else ""
        return f"**{text}**" if judged(r) == best[share] and r["cache_left"] < 1 else text

    rows = []
    for method, title in ARMS.items():
        if by := methods.get(method):
            half = by.get(0.5)
            left = f"{percent(half['cache_left'], 0)} / {percent(half['attention_parameters_left'], 0)}" if half else ""
            rows.append([title, *(cell(by.get(share), share) for share in shares), left])
    header = " | ".join(["Method", *(percent(share) for share in shares), "half leaves"])
    title = f"{PLOTTED[model]}; {AXES[dense['task']]}, dense {dense['value']:.{digits}f}"
    if "nats" in dense:
        title += (
            "\n\nIn brackets: divergence from the dense model in what it writes of the test clips, nats a token; by "
            "that the best are named."
        )
    if dense["task"] == "choice":
        asked = dense["questions"] * len(dense["sets"])
        error = math.sqrt(dense["value"] * (1 - dense["value"]) / asked)
        title += f"\n\n{asked} questions, so that a share has a standard error of {error:.3f}."
    return f"### {title}\n\n{table(header, rows)}\n\n![{PLOTTED[model]}](frontier-{model}.svg)"


def peers_at_half(results: Results) -> str:
    """Tables for the front page: what half of the directions costs, and what it leaves."""
    halves = {"smollm2": "half of Q-K and of V-O", "gemma3": "half of V-O (norms fix its Q-K)"}
    return "\n\n".join(
        _half(results, model, what) for model, what in halves.items() if f"frontier-{model}-dense" in results
    )


def _half(results: Results, model: str, what: str) -> str:
    dense = results[f"frontier-{model}-dense"]["result"]["value"]
    rows = []
    for method, title in ARMS.items():
        if r := result(results, f"frontier-{model}-{method}-500"):
            left = (percent(r[f"{size}_left"], 0) for size in ("cache", "attention_parameters"))
            rows.append((r["value"] / dense, title, *left))
    about = f"{PLOTTED[model]}, {what} removed without training, same tokens and same evaluation."
    found = [[title, f"{over:.2f}" if over < 100 else "> 100", *left] for over, title, *left in sorted(rows)]
    header = "Method | perplexity over dense | cache left | attention parameters left"
    return f"{about}\n\n{table(header, found)}"


def streaming_quality(results: Results) -> str:
    rows = []
    for name, cut in CUTS.items():
        if r := result(results, f"streaming-quality-{name}"):
            rows.append([cut, f"{r['memory']:.2f}", f"{r['streamed']:.2f}"])
    if not rows:
        raise KeyError("streaming-quality-vo25")
    about = (
        "SmolLM2-135M-Instruct, calibrated on 16 x 512 tokens; perplexity on the first 24,576 tokens of WikiText-2 "
        "test."
    )
    return f"{about}\n\n{table('Cut | in memory | streamed', rows)}"


def behind(results: Results) -> str:
    r = results["behind"]["result"]
    shares = [key for key in r if key.startswith("0.")]
    rows = [[way, *(f"{r[share][way]:.2f}" for share in shares)] for way in r[shares[0]]]
    about = (
        "Where blocks are calibrated: in the uncut model, or each behind the blocks that are cut already. "
        f"SmolLM2-135M-Instruct, {r['sequences']} x {r['length']} tokens, one plan; perplexity on the first "
        f"{r['first']:,} tokens of WikiText-2 test, dense {r['dense']:.2f}."
    )
    return f"{about}\n\n{table(' | '.join(['Calibrated', *(percent(float(s)) for s in shares)]), rows)}"


def commonsense(results: Results) -> str:
    r = results["commonsense-smollm2-texts"]["result"]
    base, p = r["base"], r["profile"]
    rows = [["untuned", "", "", f"{base['mean']:.2f}", "", f"{base['forgetting']['value']:.2f}"]]
    for key, title in METHODS.items():
        m = r[key]
        score = [f"{m['mean']:.2f}", f"{m['standard_error']:.2f}", f"{m['perplexity']:.2f}"]
        rows.append([title, f"{m['trainable_parameters']:,}", f"{m['lr']:g}", *score])
    about = (
        f"SmolLM2-135M-Instruct tuned for {p['steps']} steps of {p['batch']} examples of the commonsense mixture, "
        f"{len(p['seeds'])} seeds; {p['test_questions']} test questions of each of the eight sets, scored by "
        f"{p['score']} of the {p['candidates']}. Perplexity: WikiText-2, to see what was forgotten."
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


def healing(results: Results) -> str:
    arms = {
        "cores": "CLOVER's cores of the attention", "cores-mlp": "CLOVER's cores of attention and MLP",
        "lora": "LoRA on the attention", "lora-mlp": "LoRA on attention and MLP", "attention": "all attention weights",
    }  # fmt: skip
    rows = []
    for key, title in arms.items():
        for suffix, loss in (("", "text"), ("-distil", "dense model")):
            if r := result(results, f"healing-{key}{suffix}"):
                judged = r.get("trial_steps", r["steps"])
                size = f"{r['trainable_parameters']:,}"
                rows.append([title, loss, size, judged, f"{r['healed']:.2f}", f"{r['over_dense']:.3f}"])
    if not rows:
        raise KeyError("healing-cores")
    r = results["healing-cores"]["result"]
    about = (
        f"SmolLM2 with 50 % of Q-K and V-O removed (perplexity {r['pruned']:.2f}, dense {r['dense']:.2f}), then "
        f"trained on {r['tokens']:,} tokens of WikiText-2 train; the first {r['protocol']['tokens']:,} of test."
    )
    header = "Trained | loss from | parameters | rate chosen after steps | perplexity | over dense"
    again = {
        key: entry for key in arms for name, entry in sorted(results.items()) if name.startswith(f"healing-{key}-epyc")
    }
    said = ", ".join(f"{arms[key]} {entry['result']['over_dense']:.3f}" for key, entry in again.items())
    more = "".join(f"Run again on an {e['machine']['cpu']}: {said} times dense." for e in list(again.values())[:1])
    return f"{about}\n\n{table(header, rows)}\n\n{more}".rstrip()


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
            if found := result(results, f"healing-speech-{arm}{suffix}"):
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
    """Predicted, measured and true loss of cuts, in full for SmolLM2, as rank correlations for all."""
    rows, named = [], {r["result"].get("model", "smollm2"): r["result"] for _, r in _of(results, "loss-rank")}
    told_of = ("predicted", "measured", "true")
    for model in (m for m in LOSS_MODELS if m in named):
        points = _predicted(named[model]["points"])
        told = [[p[k] for p in points] for k in told_of]
        rows.append([LOSS_MODELS[model], len(points), *(f"{spearman(x, told[2]):.3f}" for x in told[:2])])
    about = (
        "Loss of cuts: predicted, measured on data kept out of the calibration, and true, on test data. "
        + " ".join(f"{LOSS_MODELS[m]}: {LOSS[m]}." for m in LOSS_MODELS if m in named)
    )
    ranks = table("Model | cuts | Spearman's correlation of predicted and true | of measured and true", rows)
    points = sorted(_predicted(named["smollm2"]["points"]), key=lambda p: p["true"])
    rows = [[percent(p["qk"]), percent(p["vo"]), *(percent(math.expm1(p[k])) for k in told_of)]
            for p in points]  # fmt: skip
    cuts = table(f"Q-K removed | V-O removed | {' | '.join(told_of)}", rows)
    return f"{about}\n\n{ranks}\n\nSmolLM2:\n\n{cuts}"


def _of(results: Results, kind: str) -> list[tuple[str, Any]]:
    return [(name, r) for name, r in results.items() if name == kind or name.startswith(f"{kind}-")]


def _predicted(points: list[dict]) -> list[dict]:
    """With what was predicted, whose prices are gauged at 25 % of either kind."""
    single = {k: [p for p in points if p[k] == 0.25 and p["qk"] + p["vo"] == 0.25] for k in ("qk", "vo")}
    rates = {k: found[0]["measured"] / found[0][f"{k}_cost"] for k, found in single.items() if found}
    return [p | {"predicted": sum(rates[k] * p[f"{k}_cost"] for k in rates)} for p in points]


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation of two lists without ties."""
    ranks = [[sorted(x).index(v) for v in x] for x in (a, b)]
    n = len(a)
    return 1 - 6 * sum((i - j) ** 2 for i, j in zip(*ranks, strict=True)) / (n * (n * n - 1))


def loss_bound(results: Results) -> str:
    found = {r["result"].get("model", "smollm2"): r for _, r in _of(results, "loss-bound")}
    named = {model: r["result"]["runs"] for model, r in found.items()}
    on = {m: r["machine"].get("gpu") or f"{r['machine']['threads']} CPU threads" for m, r in found.items()}
    runs = [(m, r) for m in LOSS_MODELS if m in named for r in sorted(named[m], key=lambda r: r["max_loss"])]
    rows = [[LOSS_MODELS[model], percent(r["max_loss"]),
             *(percent(r["chosen"][k]) for k in ("qk", "vo", "measured", "ceiling")),
             percent(r["true"]), len(r["measured"]), f"{r['seconds']:.0f}", on[model]]
            for model, r in runs if r["chosen"]]  # fmt: skip
    kept = sum(r["true"] <= r["max_loss"] for _, r in runs)
    about = (
        f"`--max-loss`: what is delivered for a bound, and the true loss as above. The bound is kept in {kept} of "
        f"{len(runs)} runs."
    )
    if other := [f"{percent(r['elsewhere'])} for {percent(r['max_loss'])}" for _, r in runs if "elsewhere" in r]:
        about += (
            " It speaks of data like those of the calibration: on whole paragraphs, most of them shorter, MiniLM loses "
            f"{', '.join(other)}."
        )
    columns = (
        "Model | bound | Q-K removed | V-O removed | measured | 95 % upper bound | true | cuts measured | seconds | on"
    )
    return f"{about}\n\n{table(columns, rows)}"


def peft_suite(results: Results) -> str:
    r = results["peft-suite"]["result"]
    return (
        f"peft {r['peft']}'s own `{'` and `'.join(r['files'])}` with `CloverConfig` put into their cases: "
        f"{r['passed']} pass, {r['failed']} fail, {r['skipped']} are skipped."
    )
