"""Tables of what models cost: time, memory, and the making of them."""

from __future__ import annotations

from cells import METHODS, Results, mib, percent, result, table

CUT = ("25 %", "50 %")


def speed(results: Results) -> str:
    runs = [(f"SmolLM2, context {c}", run) for c, run in result(results, "speed-smollm2").get("contexts", {}).items()]
    if "speed-encoder" in results:
        runs.append(("Whisper-base encoder", result(results, "speed-encoder")["throughput"]))
    rows = []
    for title, run in runs:
        for key, dense in run["dense"].items():
            what = key.removesuffix("_per_second").replace("_", " ")
            for cut, ratio in run["ratio"].items():
                rows.append([f"{title}, {what}/s", cut, f"{dense:.4g}", f"{run[cut][key]:.4g}", f"{ratio[key]:.2f}"])
    if not rows:
        raise KeyError("speed-smollm2")
    about = "Batch 1, float32, the models in turns in one process, medians; a ratio is the median over the turns."
    return f"{about}\n\n{table('What | removed | dense | pruned | ratio', rows)}"


def decode(results: Results) -> str:
    rows = [
        [entry["machine"]["cpu"], f"{r['context']:,}", str(r["batch"]),
         *(f"{r[k]:.3g}" for k in ("dense", "50 %", "ratio", "bound"))]
        for name, entry in sorted(results.items()) if name.startswith("decode-contexts")
        for r in entry["result"]["rows"]
    ]  # fmt: skip
    if not rows:
        raise KeyError("decode-contexts")
    about = (
        "Tokens a second that SmolLM2 writes behind a context, Q-K and V-O cut by 50 %, float32. The bound is what "
        "bytes alone allow: weights and cache of the dense model over those of the pruned one. The ratio exceeds it "
        "since transformers' default cache copies all keys and values for each token, and a pruned model's grows in "
        "place."
    )
    parts = [f"{about}\n\n{table('Processor | context | batch | dense | pruned | ratio | bound', rows)}"]
    swept: dict[str, dict] = {}
    for name in ("decode-sweep", "decode-eighth"):  # what was measured for longer counts
        for c, run in result(results, name).get("contexts", {}).items():
            title = f"SmolLM2 at a context of {c}"
            swept[title] = run | {"ratio": swept.get(title, {}).get("ratio", {}) | run["ratio"]}
    coded = result(results, "decode-encoder")
    for title, run in (swept | ({"Encoder of Whisper-base": coded["throughput"]} if coded else {})).items():
        bound = coded["bound"] if run is coded.get("throughput") else {}
        keys = list(run["dense"])
        header = ["Removed", *(k.removesuffix("_per_second").replace("_", " ") for k in keys)]
        header += ["bound of multiply-adds"] if bound else []
        body = [
            [
                cut if " %" in cut else cut.replace("%", " %"),
                *(f"{r[k]:.2f}" for k in keys),
                *([f"{bound[cut]:.2f}"] if bound else []),
            ]
            for cut, r in run["ratio"].items()
        ]
        noise = " 0 % is a second copy of the dense model: how exact this is." if "0.0%" in run["ratio"] else ""
        parts.append(f"{title}, speed over dense.{noise}\n\n{table(' | '.join(header), body)}")
    return "\n\n".join(parts)


def runtimes(results: Results) -> str:
    """Pruned models outside of PyTorch: how fast, and how near to PyTorch."""
    words, speech = result(results, "runtimes-smollm2"), result(results, "runtimes-whisper")
    if not words:
        raise KeyError("runtimes-smollm2")
    timed = {"prefill": "SmolLM2, prefill", **{k: f"SmolLM2, {k}" for k in words if k.startswith("decode at ")}}
    seconds = {title: words[key] for key, title in timed.items()}
    if speech:
        seconds["Whisper-base encoder"] = speech["encoder"]
    if outside := words["openvino"]:
        key = next(k for k in outside if k.startswith("one token"))
        seconds[f"SmolLM2 in OpenVINO, {key}"] = outside[key]
    rows = [
        [title, cut, f"{1e3 * run['dense']:.1f}", f"{1e3 * run[cut]:.1f}", f"{run['dense'] / run[cut]:.2f}"]
        for title, run in seconds.items()
        for cut in run
        if cut != "dense"
    ]
    worst = max(d for r in (words, speech) for w in r.get("written", {}).values() for d in w["difference"].values())
    same = [f"{t['identical']} of {t['clips']}" for t in speech.get("transcripts", {}).values()]
    about = (
        f"ONNX Runtime {words['protocol']['onnxruntime']}, float32, batch 1, in turns in one process. Full rank is the "
        "dense model in this project's attention: what the graph's form does by itself. Largest difference of any "
        f"output to PyTorch's when written: {worst:.1e}."
    )
    if same:
        about += f" Transcripts equal to PyTorch's, dense and by cut: {', '.join(same)}."
    return f"{about}\n\n{table('What | removed | dense ms | pruned ms | ratio', rows)}"


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
    if r := result(results, "streaming-seventy"):
        lines.append(
            f"A block of LLaMA-2-70B's shape: at most {r['block']['peak_bytes'] / 2**30:.2f} GiB. The whole "
            f"model by arithmetic, not run: {r['by_arithmetic_total'] / 60:.0f} minutes ({r['method']})."
        )
    if r := result(results, "streaming-calibrated"):
        lines.append(
            f"Calibrated on {r['sequences']} x {r['length']} tokens, {r['layers_run']} layers of LLaMA-2-7B's shape: "
            f"{r['seconds']:.0f} s, at most {r['peak_bytes'] / 2**30:.2f} GiB. The whole model by arithmetic, not run: "
            f"{r['whole_model_seconds'] / 60:.0f} minutes ({r['whole_model_method']})."
        )
    if r := result(results, "streaming-whisper"):
        rows = [[n, f"{r[n]['seconds']:.0f}", f"{r[n]['peak_bytes'] / 2**30:.2f}"] for n in ("memory", "streamed")]
        said = r["streamed"]["said"]
        gone = 1 - said["parameters_after"] / said["parameters_before"]
        lines.append(
            f"Whisper-large-v3's sizes, float16, Q-K and V-O {percent(r['qk'], 0)}: {percent(gone)} of the "
            f"parameters go; the encoder runs at {r['encoder']['ratio']:.2f} of the dense "
            f"one's speed.\n\n{table('Way | seconds | peak GiB', rows)}"
        )
    if r := result(results, "streaming-processes"):
        stages = {"weights": ("decompose", "cut"), "calibrated": ("moments", "find_basis", "refit")}
        rows = [
            [f"{kind}: {stage}", *(f"{run[stage]:.1f}" for run in r[kind]["runs"].values())]
            for kind, names in stages.items() for stage in names
        ]  # fmt: skip
        header = " | ".join(["Seconds, processes x threads", *r["weights"]["runs"]])
        largest = max(r[kind]["difference"]["processes"] for kind in stages)
        equal = f"differ by at most {largest:.1g} of a tensor" if largest else "are equal to the last bit"
        lines.append(f"Several processes; the results of one and of two {equal}.\n\n{table(header, rows)}")
    return "\n\n".join(lines)


def tuning_cost(results: Results) -> str:
    r = results["tuning-steps"]["result"]
    shapes = [key for key in r if " x " in key]
    rows = [
        [title, f"{r['trainable_parameters'][key]:,}"]
        + [f"{r[shape][key][what]:.3f}" for shape in shapes for what in ("time_over_lora", "memory_over_lora")]
        for key, title in METHODS.items()
    ]
    titles = [f"{what}, {shape}" for shape in shapes for what in ("time", "saved activations")]
    for shape, found in result(results, "tuning-memory").items():
        if shape in shapes:
            titles.append(f"peak memory, {shape}")
            for row, key in zip(rows, METHODS, strict=True):
                row.append(f"{found[key]['over_lora']:.3f}")
    about = (
        "A training step of SmolLM2 on the same modules, over LoRA's; batch x tokens, float32, methods in turns (peak "
        "memory: all that a process of its own holds, weights included)."
    )
    text = f"{about}\n\n{table(' | '.join(['Method', 'parameters', *titles]), rows)}"
    for other in (results[name] for name in sorted(results) if name.startswith("tuning-steps-")):
        times = " and ".join(f"{other['result'][shape]['clover']['time_over_lora']:.3f}" for shape in shapes)
        here, there = (e["machine"]["cpu"] for e in (results["tuning-steps"], other))
        text += f"\n\nThis was on an {here}. On an {there} CLOVER's step took {times} of LoRA's."
    if start := result(results, "tuning-start"):
        text += (
            f"\n\nThe cores of SmolLM2 are made in {start['smollm2_seconds']:.1f} s, those of a model of LLaMA-2-7B's "
            f"shape in {start['llama_2_7b_seconds']:.0f} s ({start['llama_2_7b']})."
        )
    return text


def gpu(results: Results) -> str:
    run, cost, tuned, fast = (results[f"gpu-{name}"]["result"] for name in ("eager", "pruning", "tuning", "compiled"))
    rows, first = [], []
    for r in run["rows"]:
        if r["what"] == "first":
            dense, *others = r["rates"].values()
            first.append([f"{r['context']:,}", f"{dense:.1f}", *(f"{rate / dense:.1f}" for rate in others)])
            continue
        key = f"{r['what']}_tokens_per_second"
        ratios = r["rates"]["ratio"]
        bound = [f"{r['bound'][cut]:.2f}" if "bound" in r else "" for cut in ratios]
        speeds = [f"{of_cut[key]:.2f}" for of_cut in ratios.values()]
        rows.append([r["what"], f"{r['context']:,}", r["batch"], f"{r['rates']['dense'][key]:,.0f}", *speeds, *bound])
    header = [
        "What",
        "context",
        "batch",
        "dense tokens/s",
        *(f"ratio, {cut} removed" for cut in CUT),
        *(f"bound at {c}" for c in CUT),
    ]
    compiled = [
        [f"{r['context']:,}", r["batch"], f"{r['milliseconds']['dense']:.2f}",
         *(f"{r[which][cut]:.2f}" for which in ("ratio", "bound") for cut in CUT)]
        for r in fast["rows"]
    ]  # fmt: skip
    weights, calibrated = (
        {k: v for k, v in cost[n].items() if k.endswith("seconds")} for n in ("weights", "calibrated")
    )
    methods = tuned["methods"]
    steps = [
        [METHODS[n], f"{m['parameters']:,}", f"{m['step_milliseconds']:.0f}",
         f"{m['step_milliseconds'] / methods['lora']['step_milliseconds']:.2f}", f"{m['start_seconds']:.1f}"]
        for n, m in methods.items()
    ]  # fmt: skip
    return (
        "A model of LLaMA-2-7B's shape with random weights, bfloat16, on one "
        f"{results['gpu-eager']['machine']['gpu']}: speed over dense, without compilation, each cut in Q-K and V-O "
        "alike. Where a new token is no faster, starting kernels takes the time, not what they do.\n\n"
        f"{table(' | '.join(header), rows)}\n\n"
        "The same at cache lengths not seen before in the process, as in a first text: the "
        "dense model's library plans its kernel anew for each length.\n\n"
        f"{table(' | '.join(['behind', 'dense tokens/s', *header[4:6]]), first)}\n\n"
        f"One token with a static cache, compiled (`reduce-overhead`, so one CUDA graph), {fast['layers']} layers:\n\n"
        f"{table(' | '.join(['context', 'batch', 'dense ms', *header[4:]]), compiled)}\n\n"
        f"Pruning it takes {sum(weights.values()):.1f} s by the weights, {sum(calibrated.values()):.0f} s calibrated "
        f"on {cost['sequences']} x {cost['length']} tokens. A training step of {tuned['batch'][0]} x "
        f"{tuned['batch'][1]} tokens, same modules:\n\n"
        f"{table('Method | parameters | milliseconds | over LoRA | seconds to start', steps)}"
    )
