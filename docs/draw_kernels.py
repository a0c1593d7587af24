"""Draws docs/kernels.svg, how a block of a scatter turns entries into rows: python docs/draw_kernels.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "fedpeft_ext"  # the same file each time
import matplotlib.pyplot as plt  # noqa: E402

ROWS = [2, 0, 2, 1, 0, 2]  # the row that each entry adds to
COLOURS = ["#4c78a8", "#f58518", "#54a24b"]


def main() -> None:
    figure, axes = plt.subplots(figsize=(9, 3.2))
    axes.set_xlim(-1.4, 16)
    axes.set_ylim(-1.6, 3.4)
    axes.axis("off")

    def box(x: float, y: float, text: str, colour: str, width: float = 0.8) -> None:
        axes.add_patch(plt.Rectangle((x, y), width, 0.7, facecolor=colour, edgecolor="black", linewidth=0.8))
        axes.text(x + width / 2, y + 0.35, text, ha="center", va="center", fontsize=9, color="white")

    axes.text(0, 3.0, "1  each thread finds its entry's row", fontsize=9)
    for entry, row in enumerate(ROWS):
        box(entry * 0.9, 2.0, f"r{row}", COLOURS[row])
        axes.text(entry * 0.9 + 0.4, 1.75, str(entry), ha="center", fontsize=8)
    axes.text(0, 1.1, "2  a warp links them, 32 at a time", fontsize=9)
    following = [
        next((e for e in range(i + 1, len(ROWS)) if ROWS[e] == ROWS[i]), -1) for i in range(len(ROWS))
    ]
    for entry, row in enumerate(ROWS):
        box(entry * 0.9, 0.1, str(following[entry]), COLOURS[row])
    axes.text(-1.3, 0.45, "next", fontsize=9, va="center")
    for row in range(3):
        box(row * 0.9, -1.2, str(ROWS.index(row)), COLOURS[row])
    axes.text(-1.3, -0.85, "head", fontsize=9, va="center")
    axes.text(7.2, 3.0, "3  a group of lanes a row: gradients added in position order,", fontsize=9)
    axes.text(7.6, 2.6, "in registers, and stored once", fontsize=9)
    for row in range(3):
        entries = [e for e, r in enumerate(ROWS) if r == row]
        box(7.2, 1.6 - row * 1.1, f"row {row}", COLOURS[row], 1.4)
        axes.text(
            8.9, 1.95 - row * 1.1, "=  " + " + ".join(f"g[{e}]" for e in entries), va="center", fontsize=10
        )
    figure.savefig(Path(__file__).with_name("kernels.svg"), bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
