"""The table as one picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loragen.core.files import written_atomically

TITLES = {"new_wording": "new wording", "new_combination": "new combination", "both": "both"}
HIGHLIGHT, PLAIN, BOUND = "#d1495b", "#8d99ae", "#2b2d42"


def draw(results: Mapping[str, Any], file: Path) -> None:
    """Accuracy of every contestant, a panel per split; the generated adapter is highlighted."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        1, len(TITLES), figsize=(12, 4.2), sharey=True, layout="constrained"
    )
    for panel, (split, title) in zip(panels, TITLES.items(), strict=True):
        columns = results["accuracy"][split]
        colours = [{"generated": HIGHLIGHT, "oracle": BOUND}.get(name, PLAIN) for name in columns]
        names = [name.replace("_", " ") for name in columns]
        bars = panel.barh(names, list(columns.values()), color=colours)
        panel.bar_label(bars, fmt="%.2f", padding=3)
        panel.set(title=title, xlim=(0, 1.15), xticks=[0, 0.5, 1])
        panel.invert_yaxis()
        panel.spines[["top", "right"]].set_visible(False)
    seconds = results["seconds"]
    figure.suptitle(
        f"Accuracy on unseen creatures (seed {results['seed']}): an adapter trained in "
        f"{seconds['train_adapter']:.1f} s, generated in {seconds['generate_adapter']:.2f} s"
    )
    figure.supxlabel("exact match, mean over the targets of a split")
    with written_atomically(file) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
