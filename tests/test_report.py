from __future__ import annotations

import math
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from clover.command import report
from clover.errors import CloverError
from clover.planning.plan import BlockPlan, Group, Plan, Spectrum

SUMMARY = {
    "qk_removed": 0.5601,
    "vo_removed": 0.3682,
    "attention_parameters_before": 26_542_080,
    "attention_parameters_after": 14_213_120,
    "parameters_before": 134_515_008,
    "parameters_after": 122_186_048,
    "kv_bytes_per_token_before": 23_040,
    "kv_bytes_per_token_after": 12_320,
}
VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Checks that every element is closed in its turn, and keeps text and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def spectrum(name: str, part: str = "decoder", heads: int = 2, size: int = 8) -> Spectrum:
    rows = tuple(tuple(math.exp(-i - head) for i in range(size)) for head in range(heads))
    return Spectrum(name, part, rows, rows, rows, rows)


def block(name: str, part: str = "decoder") -> BlockPlan:
    """Two KV heads; the second is gone whole."""
    return BlockPlan(name, part, 1, 2, 8, 8, (Group((0,), 1, 1, 5),), False, 1024)


def write(path: Path, **changes: object) -> Reader:
    names = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    arguments: dict = {
        "title": "tiny",
        "spectra": [spectrum(n) for n in names],
        "plan": Plan(tuple(block(n) for n in names)),
        "summary": SUMMARY,
    }
    report.write_report(path, **(arguments | changes))
    return Reader(path.read_text(encoding="utf-8"))


def test_report_has_the_numbers_the_ranks_and_the_plan(tmp_path: Path) -> None:
    page = write(tmp_path / "r.html", measurements={"perplexity": {"before": 25.91, "after": 28.13}})
    text = " ".join(page.text)
    for number in ("56.0", "36.8", "14,213,120", "122,186,048", "12,320", "25.91", "28.13", "+8.6 %", '"value": 5'):
        assert number in text.replace("\N{NO-BREAK SPACE}", " "), number
    cells = [attributes.get("title") for attributes in page.all("td")]
    assert [cells.count(t) for t in ("3 of 8", "5 of 8", "head gone whole")] == [2, 2, 4]
    assert "2" in text and "heads are gone whole" in text
    assert len(page.all("details")) == 1


def test_report_needs_nothing_from_outside(tmp_path: Path) -> None:
    page = write(tmp_path / "r.html")
    raw = (tmp_path / "r.html").read_text(encoding="utf-8").lower()
    assert "http:" not in raw and "https:" not in raw and "url(" not in raw and "@import" not in raw
    assert not [t for t, _ in page.tags if t in ("script", "link", "iframe")]
    (image,) = page.all("img")
    assert (image["src"] or "").startswith("data:image/png;base64,") and "2 attention blocks" in (image["alt"] or "")


def test_report_escapes_what_it_is_given(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>&'
    page = write(
        tmp_path / "r.html",
        title=evil,
        spectra=[spectrum(evil, part=evil)],
        plan=Plan((block(evil, part=evil), block("other.0"))),
        measurements={evil: {"before": 1.0, "after": 2.0, "unit": evil}},
    )
    assert not page.all("script")
    assert page.text.count(evil) >= 3  # the title twice, the measurement; the parser has unescaped them


def test_report_without_plan_and_spectra(tmp_path: Path) -> None:
    page = write(tmp_path / "r.html", spectra=[], plan=None, summary={})
    assert "Nothing was removed" in " ".join(page.text)
    assert not page.all("img") and not page.all("table") and not page.all("details")


def test_stacks_are_told_apart() -> None:
    names = {
        "text_model.encoder.layers.0.self_attn": "encoder",
        "vision_model.encoder.layers.0.self_attn": "encoder",
        "text_model.decoder.layers.0.self_attn": "decoder",
    }
    blocks = [block(name, part) for name, part in names.items()]
    labels = [("encoder text_model", "0"), ("encoder vision_model", "0"), ("decoder", "0")]
    assert report._labels(blocks) == labels


def test_an_old_report_outlives_a_failed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")

    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(CloverError, match="cannot write"):
        write(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["missing/r.html", "file/r.html", "folder", "folder/"])
def test_a_target_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CloverError, match="cannot write"):
        write(tmp_path / name, spectra=[])
    with pytest.raises(CloverError, match="cannot write"):
        report.check_target(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_good_target_passes_the_check(tmp_path: Path) -> None:
    report.check_target(tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


def test_missing_matplotlib_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for call in (
        lambda: write(tmp_path / "r.html"),
        lambda: report.plot_spectra([spectrum("a.0")], tmp_path / "p.png"),
        lambda: report.check_target(tmp_path / "r.html"),
    ):
        with pytest.raises(CloverError, match=r'pip install "clover-attention\[report\]"'):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("PDF", b"%PDF")])
def test_plot_by_suffix(tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = tmp_path / f"p.{suffix}"
    report.plot_spectra([spectrum("a.0"), spectrum("a.1", heads=1)], path)
    assert path.read_bytes().startswith(magic)
    assert list(tmp_path.iterdir()) == [path]


def test_plot_refuses_other_formats_and_nothing(tmp_path: Path) -> None:
    for name in ("p.gif", "p"):
        with pytest.raises(CloverError, match=r"\.png, \.svg, \.pdf"):
            report.plot_spectra([spectrum("a.0")], tmp_path / name)
    with pytest.raises(CloverError, match="no spectra"):
        report.plot_spectra([], tmp_path / "p.png")


def test_plot_takes_dead_heads_pairs_and_untouched_sides(tmp_path: Path) -> None:
    zeros, rows = ((0.0,) * 8,) * 2, spectrum("x").vo
    odd = [
        Spectrum("a.0", "decoder", zeros, zeros, zeros, zeros),
        Spectrum("a.1", "decoder", tuple(row[:4] for row in rows), rows, rows, rows),
        Spectrum("a.2", "decoder", (), rows, (), rows),
    ]
    report.plot_spectra(odd, tmp_path / "some.png")
    report.plot_spectra(odd[:1], tmp_path / "dead.png")


def test_figure_has_a_panel_for_each_side_of_each_block() -> None:
    figure = report._figure([spectrum(f"a.{i}", heads=3) for i in range(5)])
    shown = [ax for ax in figure.axes if ax.axison]
    assert [ax.get_title(loc="left") for ax in shown] == [f"layer {i}" for i in range(5)] * 2
    assert all(ax.get_yscale() == "log" for ax in shown)
    thin_norms, norms, thin_values, values = shown[0].collections
    assert [len(c.get_segments()) for c in (thin_norms, norms, thin_values, values)] == [3, 1, 3, 1]
    middle = spectrum("a.0", heads=3).qk[1]
    assert values.get_segments()[0].tolist() == [[i, pytest.approx(v)] for i, v in enumerate(middle, 1)]


def test_table_rows() -> None:
    rows = report.table(SUMMARY, {"WER": {"before": 4.66, "after": 5.02, "unit": "%"}, "tokens/s": {"after": 1234.5}})
    assert rows == [
        ("Q-K directions", "100.0 %", "44.0 %", "-56.0 %"),
        ("V-O directions", "100.0 %", "63.2 %", "-36.8 %"),
        ("attention parameters", "26,542,080", "14,213,120", "-46.5 %"),
        ("parameters", "134,515,008", "122,186,048", "-9.2 %"),
        ("KV cache, bytes per token", "23,040", "12,320", "-46.5 %"),
        ("WER", "4.66 %", "5.02 %", "+0.36 points"),
        ("tokens/s", "n/a", "1,234.50", "n/a"),
    ]


def test_table_of_an_encoder_has_no_cache_and_of_nothing_no_rows() -> None:
    whole = SUMMARY | {"vo_removed": 0.0, "kv_bytes_per_token_before": 0, "kv_bytes_per_token_after": 0}
    rows = report.table(whole, {"loss": {"before": 0.0, "after": 0.5}})
    assert "KV" not in " ".join(row.what for row in rows)
    assert rows[1].change == "unchanged" and rows[-1].change == "n/a"
    assert report.table({}) == []
