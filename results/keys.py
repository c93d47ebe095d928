"""Draw perplexity against the number of keys, a panel a length, from what evaluate.py wrote.

    python results/keys.py FIGURE.png TITLE=OUT/evaluate.json[,OUT2/evaluate.json ...] [TITLE=... ...]
    python results/keys.py --time FIGURE.png ...     against the time of attention in all layers

Perplexity over that of the model named dense, or else of the teacher, of each student at its own number of
keys and at each of --topk. Models without such a number are horizontal lines. Against time they are points,
and the points of students bear their numbers of keys.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import evaluate


AXES = {"keys": "keys per query and head", "attention_ms": "ms for attention in all layers, logarithmic"}


def lines(models: dict[str, dict], x: str) -> dict[str, list[tuple[float, float, float]]]:
    """Name -> (x, perplexity over dense, keys a query), by x; one point for models without a choice."""
    base = models.get("dense", models["teacher"])["ppl"]
    found = {}
    for name, row in models.items():
        if x in row:  # an oracle has no time
            found.setdefault(row.get("student", name), []).append((row[x], row["ppl"] / base, row["keys"]))
    return {name: sorted(points) for name, points in found.items()}


def draw(path: str, files: dict[str, str], x: str = "keys") -> None:
    plt = evaluate.pyplot()
    from matplotlib.ticker import LogLocator  # after pyplot, which says what to install where it is missing

    width = 8 if x == "attention_ms" else 5.2
    figure, axes = plt.subplots(1, len(files), figsize=(width * len(files), 4), layout="constrained", squeeze=False)
    for axis, (title, names) in zip(axes[0], files.items()):
        models = {}
        for name in names.split(","):
            models |= json.loads(Path(name).read_text())["models"]
        found = lines(models, x)
        flat = {name: points[0] for name, points in found.items() if len(points) == 1}
        curves = {name: points for name, points in found.items() if len(points) > 1}
        for style, (name, points) in zip(("-", "--", ":") * len(curves), curves.items()):  # a curve on another shows
            places, ys, keys = zip(*points)
            has_variants = "," not in name and any(other.startswith(name + ",") for other in found)
            axis.plot(places, ys, style, marker="o", label=f"{name}, as trained" if has_variants else name)
        highest = max(y for points in curves.values() for _, y, _ in points)
        for style, (name, (place, y, _)) in zip(("--", ":", "-.") * len(flat), flat.items()):
            if y > (1.0 if x == "attention_ms" else 1.1) * highest:  # a number says more than so high a place
                axis.plot([], [], " ", label=f"{name}: {y:.2f}")
            elif x == "attention_ms":
                axis.plot(place, y, "s", label=name)
            else:
                axis.axhline(y, linestyle=style, color="gray", label=name)
        fewer = [point for points in found.values() for point in points if point[2] < models["teacher"]["keys"]]
        for place, y, n in fewer if x == "attention_ms" else ():
            axis.annotate(f"{n:.0f}", (place, y), (4, 4), textcoords="offset points", fontsize=8)
        axis.margins(x=0.08)
        axis.set_xscale("log", base=2)
        if x == "attention_ms":
            axis.xaxis.set_major_locator(LogLocator(10, subs=(1, 1.5, 2, 3, 4, 6, 8)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(title=title, xlabel=AXES[x], ylabel="perplexity over dense")
        axis.grid(alpha=0.3)
        if x == "attention_ms":  # beside it, since its points are anywhere
            axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
        else:
            axis.legend(loc="upper right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    by_time = sys.argv[1] == "--time"
    path, *files = sys.argv[1 + by_time :]
    draw(path, dict(file.split("=", 1) for file in files), "attention_ms" if by_time else "keys")
