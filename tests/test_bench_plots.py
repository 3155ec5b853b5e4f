"""Pictures of benchmarks show what the CSV files say, and come out the same again."""

import csv
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from command_line import usage_error

from cuattn.bench import curves, plots
from cuattn.cli import main

pytest.importorskip("matplotlib", reason="pictures need matplotlib")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
FORWARD = RESULTS / "nvidia-h200" / "forward.csv"
PICTURES = ROOT / "docs" / "pictures"
SVG = "{http://www.w3.org/2000/svg}"
Points = list[tuple[float, float]]


def texts(path: Path) -> list[str]:
    return ["".join(element.itertext()).strip() for element in ElementTree.parse(path).iter(f"{SVG}text")]


def lines(path: Path) -> dict[str, Points]:
    """The corners of each curve, in the picture's units, by its name."""
    found = {}
    for group in ElementTree.parse(path).iter(f"{SVG}g"):
        drawn = group.find(f"{SVG}path")
        if drawn is not None and "-" in group.get("id", ""):
            numbers = [float(x) for x in re.findall(r"-?\d+\.?\d*", drawn.get("d", ""))]
            found[group.get("id", "")] = list(zip(numbers[::2], numbers[1::2], strict=True))
    return found


def assert_in_proportion(heights: list[float], values: list[float]) -> None:
    """A height falls in proportion to its value, as y does in a picture."""
    low, high = values.index(min(values)), values.index(max(values))
    slope = (heights[high] - heights[low]) / (values[high] - values[low])
    assert slope < 0
    for height, value in zip(heights, values, strict=True):
        assert height == pytest.approx(heights[low] + slope * (value - values[low]), abs=0.01)


def table() -> list[dict[str, str]]:
    with FORWARD.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if (row["figure"], row["pass"]) == ("forward", "first")]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    assert main(["bench", "plot", str(FORWARD), "--figure", "forward", "--to", str(folder)]) == 0
    return folder


def test_rates_are_those_of_the_file(drawn: Path) -> None:
    picture = drawn / "nvidia-h200-forward-rate.svg"
    shown, rows = lines(picture), table()
    for head_dim, mask in (("64", "causal"), ("128", "full"), ("256", "causal")):
        heights, rates = [], []
        for provider in ("cuattn", "flash", "cudnn"):
            mine = [
                (int(row["length"]), float(row["tflops"]))
                for row in rows
                if (row["dtype"], row["head_dim"], row["value_dim"], row["mask"], row["provider"])
                == ("bfloat16", head_dim, head_dim, mask, provider)
            ]
            points = shown[plots.slug(f"bfloat16, D {head_dim}, {mask} {provider}")]
            assert len(points) == len(mine) >= 2
            assert [x for x, _ in points] == sorted(x for x, _ in points)
            heights += [y for _, y in points]
            rates += [rate for _, rate in sorted(mine)]
        assert_in_proportion(heights, rates)


def test_prices_are_ratios_to_the_fastest_peer(drawn: Path) -> None:
    shown, rows = lines(drawn / "nvidia-h200-forward-price.svg"), table()
    heights, prices = [shown["as-fast-as-the-fastest-peer"][0][1]], [1.0]
    for head_dim in ("64", "128"):
        for mask in ("causal", "full"):
            points = shown[f"price-bfloat16-d-{head_dim}-{mask}"]
            problem = [r for r in rows if (r["dtype"], r["head_dim"], r["mask"]) == ("bfloat16", head_dim, mask)]
            for length, (_, height) in zip((512 << i for i in range(7)), points, strict=True):
                rates = {r["provider"]: float(r["tflops"]) for r in problem if r["length"] == str(length)}
                heights.append(height)
                prices.append(rates["cuattn"] / max(rates["flash"], rates["cudnn"]))
    assert_in_proportion(heights, prices)


def test_title_and_legend_say_what_was_measured(drawn: Path) -> None:
    rate, price = (texts(drawn / f"nvidia-h200-forward-{name}.svg") for name in ("rate", "price"))
    versions = "torch 2.11.0+cu130, cuDNN 91900, NVRTC 13.0, triton 3.6.0, driver 580.159.04, cuattn "
    for shown in (rate, price):
        assert any(text.startswith(versions) for text in shown)
        assert {"512", "1K", "16K", "length"} <= set(shown)
    assert "NVIDIA H200: prefill, TFLOP/s" in rate
    assert {"cuattn", "flash", "cudnn", "bfloat16, D 64, causal", "bfloat16, D 128, full"} <= set(rate)
    assert "cuattn launch" not in rate
    assert "float32, D 64, causal" not in rate, "one length is no curve"
    assert "NVIDIA H200: the price of invariance, prefill" in price
    assert "bfloat16, D 128, causal" in price


def test_the_same_rows_give_the_same_files(drawn: Path, tmp_path: Path) -> None:
    files = plots.draw(curves.read([FORWARD]), tmp_path)
    assert {file.suffix for file in files} == {".svg", ".png"}
    for file in drawn.iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes(), file.name


def test_committed_pictures_are_those_of_the_committed_files(drawn: Path) -> None:
    """CONTRIBUTING.md has the command that draws them."""
    made, committed = (sorted(folder.iterdir()) for folder in (drawn, PICTURES))
    assert [file.name for file in made] == [file.name for file in committed]
    for new, old in zip(made, committed, strict=True):
        if new.suffix == ".svg":  # fonts may differ with matplotlib's version, what is said may not
            assert texts(new) == texts(old)
            assert lines(new).keys() == lines(old).keys()
            for name, points in lines(new).items():
                for new_point, old_point in zip(points, lines(old)[name], strict=True):
                    assert new_point == pytest.approx(old_point, abs=0.5), name


def test_every_kind_of_file_is_drawn(tmp_path: Path) -> None:
    files = [*(FORWARD.parent / f"{name}.csv" for name in ("decode", "chunked")), FORWARD]
    files.append(RESULTS / "nvidia-h100" / "backward.csv")
    made = {file.name for file in plots.draw(curves.read(files), tmp_path) if file.suffix == ".svg"}
    assert made == {
        *("nvidia-h200-forward-rate.svg", "nvidia-h200-forward-price.svg"),
        *("nvidia-h200-chunk-rate.svg", "nvidia-h200-chunk-price.svg"),
        *("nvidia-h200-decode-rate.svg", "nvidia-h200-decode-price.svg"),
        *(f"nvidia-h100-80gb-hbm3-{f}-{p}.svg" for f in ("backward", "forward-backward") for p in ("rate", "price")),
    }
    decode = texts(tmp_path / "nvidia-h200-decode-rate.svg")
    assert {"32/8 heads, batch 32", "64/8 heads, batch 1", "32/8 heads, batch 8, pages of 16"} <= set(decode)
    assert "over 8192 cached tokens" in texts(tmp_path / "nvidia-h200-chunk-rate.svg")


def row(**changes: Any) -> dict[str, Any]:
    common = {"figure": "forward", "provider": "cuattn", "length": 512, "gpu": "X", "tflops": "2.0", "torch": "2"}
    return {**common, "dtype": "float16", "head_dim": 64, "value_dim": 32, "mask": "full", **changes}


def test_pictures_of_rows_that_are_not_in_a_file() -> None:
    rows = [row(), row(length=1024), row(provider="flash", tflops="4.0"), row(provider="flex", note="a reason")]
    rows += [row(length=1024, provider="cudnn", tflops="1.0"), row(**{"pass": "again"}), row(provider="cuattn launch")]
    del rows[3]["tflops"]
    (picture,) = curves.pictures(rows)
    assert picture.panels == {
        "float16, D 64, V 32, full": {"cuattn": {512: 2.0, 1024: 2.0}, "flash": {512: 4.0}, "cudnn": {1024: 1.0}}
    }
    assert picture.prices() == {"float16, D 64, V 32, full": {512: 0.5, 1024: 2.0}}
    assert picture.versions == "torch 2"
    assert curves.pictures([row()]) == []
    alone = curves.pictures([row(), row(length=1024)])[0]
    assert alone.prices() == {}
    with pytest.raises(ValueError, match="cuattn, 512: got two rates, expected one"):
        curves.pictures([row(), row()])


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write(text: str) -> str:
        (tmp_path / "a.csv").write_text(text, encoding="utf-8")
        return str(tmp_path / "a.csv")

    for text, expected in (
        ("", "a.csv: got the columns none, expected also figure, provider, length, gpu"),
        ("figure,length,gpu,x\n", "got the columns figure, length, gpu, x, expected also provider"),
        ("figure,provider,length,gpu\nroof,a,1,X\n", "got no rows to draw, expected some whose figure is forward, "),
        ("figure,provider,length,gpu,gb_per_s\ndecode,a,1,X,2\n", "expected also heads, kv_heads, batch, page_size"),
    ):
        usage_error("bench", "plot", write(text), "--to", str(tmp_path))
        assert expected in capsys.readouterr().err
    usage_error("bench", "plot", str(FORWARD), str(FORWARD), "--to", str(tmp_path))
    assert "got two rates, expected one" in capsys.readouterr().err
    usage_error("bench", "plot", str(FORWARD), "--to", write(""))
    assert "a.csv', expected a folder" in capsys.readouterr().err
    usage_error("bench", "plot")
    assert main(["bench", "plot", str(tmp_path / "absent.csv")]) == 1
    assert "absent.csv" in capsys.readouterr().err
    header = ",".join(row())
    assert main(["bench", "plot", write(f"{header}\n{','.join(map(str, row().values()))}\n")]) == 1
    assert plots.NOTHING in capsys.readouterr().out


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "plot", str(FORWARD)]) == 1
    assert "pip install 'cuattn[bench]'" in capsys.readouterr().err
