"""From the result files to tables: writes docs/results.md and the block between the ``results`` marks of README.md.

    python benchmarks/tables.py

Runs any number of times to the same end. Measurements that have no result file yet have no table.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable

from cells import Results
from common import RESULTS, ROOT
from tables_of_cost import decode, decomposition, gpu, memory, runtimes, speed, streaming, tuning_cost
from tables_of_quality import (
    behind,
    commonsense,
    embedding,
    frontier,
    healing,
    healing_speech,
    language,
    loss_bound,
    loss_rank,
    peers_at_half,
    peft_suite,
    speech,
    speech_parts,
    streaming_quality,
)

MARKS = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.DOTALL)


Section = Callable[[Results], str]
SECTIONS: dict[str, tuple[Section, str]] = {
    "Language": (language, "language-(dense|vo|qk|both)"),
    "Speech": (speech, "speech-(dense|vanilla|weights|calibrated)"),
    "Speech: the other parts of the model": (speech_parts, "speech-(decoder|cross|divided|thresholds)"),
    "Embeddings": (embedding, "embedding-"),
    "Peers": (peers_at_half, "frontier-(smollm2|gemma3)-(.*-500|dense)"),
    "Frontier: this project and its peers": (frontier, "frontier-"),
    "Speed": (speed, "speed-(smollm2|encoder)"),
    "Long contexts": (decode, "decode-.*"),
    "On a GPU": (gpu, "gpu-"),
    "Other runtimes": (runtimes, "runtimes-"),
    "Memory": (memory, "speed-memory"),
    "Decomposition": (decomposition, "decompose-"),
    "Streaming": (streaming, "streaming-(weights|seventy|calibrated|whisper|processes)"),
    "Streaming: quality": (streaming_quality, "streaming-quality-"),
    "Calibration behind cut blocks": (behind, "behind"),
    "Tuning: the cost of a step": (tuning_cost, "tuning-"),
    "Tuning: commonsense": (commonsense, "commonsense-smollm2-texts"),
    "Healing": (healing, "healing-(?!speech)"),
    "Healing of speech": (healing_speech, "healing-speech-"),
    "A budget of loss: what is predicted": (loss_rank, "loss-rank"),
    "A budget of loss: what is delivered": (loss_bound, "loss-bound"),
    "peft's tests": (peft_suite, "peft-suite"),
}
"""Title -> (what makes the section, pattern of the result files that it reads)."""
README = (
    "Language",
    "Peers",
    "Speech",
    "Speed",
    "Decomposition",
    "Tuning: the cost of a step",
    "Tuning: commonsense",
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
    machines = sorted(
        {
            ", ".join([e["machine"].get("gpu", ""), e["machine"]["cpu"], f"{e['machine']['threads']} threads"]).lstrip(
                ", "
            )
            for e in entries
        }
    )
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


if __name__ == "__main__":
    main()
