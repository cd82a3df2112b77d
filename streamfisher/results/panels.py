"""Spectra drawn on matplotlib axes: the one way of drawing that pictures, pages and notebooks share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from streamfisher.results.bootstrap import BlockBootstrap
from streamfisher.results.line_styles import FEW_LAYERS, LineStyle, depth_scale, kind_of, line_styles
from streamfisher.results.notebook import WHOLE, Block, Shown, partial_prefix, structure_name
from streamfisher.runtime.printable import printable

#: The whole model lies wide and grey under the blocks.
WHOLE_STYLE = LineStyle("#a0a0a0", "-", 3.2)
_LEGEND = 16  # more entries than that say nothing
_POINTS = 600  # of a curve, evenly along a logarithmic axis


def as_text(name: object) -> str:
    """Return a name as a figure shows it: dollars begin no formula, nothing is hidden, no letter is missing in XML."""
    text = printable(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text  # a legend leaves such labels out


def model_name(spectrum: Shown) -> str:
    """Return the class of the model, without its modules; empty where gradients were given without one."""
    return str((spectrum.metadata.get("model") or {}).get("class", "")).rsplit(".", 1)[-1]


def matrix_name(spectrum: Shown) -> str:
    """Return which matrix the spectrum is of."""
    return "gradient covariance" if spectrum.metadata.get("centered") else "empirical Fisher"


def eigenvalue_unit(spectrum: Shown) -> str:
    """Return the unit of an eigenvalue: that of a squared gradient of the loss."""
    loss = "nats" if "cross-entropy" in str(spectrum.metadata.get("loss_reduction")) else "loss units"
    return f"({loss} per unit of a parameter)²"


def drawn_blocks(spectrum: Shown) -> Mapping[str, Block]:
    """Return what has a line: the blocks that a gradient reached; the one of the whole model under its name."""
    blocks = spectrum.reached
    return {WHOLE: blocks["global"]} if list(blocks) == ["global"] else blocks


def smallest(spectrum: Shown) -> float | None:
    """Return the smallest eigenvalue above the floor of its block, which a picture must show; `None` for none."""
    blocks = [*spectrum.reached.values(), *([spectrum.whole] if spectrum.whole is not None else [])]
    least = [float(block.eigenvalues[block.above_floor].min()) for block in blocks if block.above_floor.any()]
    return min(least) if least else None


def draw_eigenvalues(axis: Any, spectrum: Shown, *, bottom: float | None = None) -> None:
    """Draw the eigenvalues of every block and of the whole model on one matplotlib axis, log-log.

    Depth is a scale of colours, with a colour bar, or numbers on the lines where they are few; embedding, output and
    kinds of modules differ in dashes. N is a vertical line. What lies below a block's noise floor is faint, and the
    floors are a grey band, or named where they lie under the picture. Intervals are shaded where there are any.

    Args:
        axis: of a figure with `layout='constrained'`, or with room for a colour bar.
        spectrum: its title says which.
        bottom: of the picture; `None`: below the smallest eigenvalue above the noise floor.
    """
    blocks = drawn_blocks(spectrum)
    styles = {WHOLE: WHOLE_STYLE} if WHOLE in blocks else line_styles(blocks)
    if len(blocks) > 1 and spectrum.whole is not None:
        _curve(axis, spectrum.whole, WHOLE_STYLE, WHOLE, 0)
    for number, (name, block) in enumerate(blocks.items(), 1):
        if spectrum.bootstrap is not None and (drawn := spectrum.bootstrap.of(block.name)) is not None:
            band(axis, drawn, block, styles[name].colour)
        _curve(axis, block, styles[name], name, number)
    least = smallest(spectrum)
    bottom = least / 3 if bottom is None and least is not None else bottom
    if bottom is not None:
        axis.set_ylim(bottom=bottom)
    n = max(block.n_samples for block in blocks.values())
    axis.set_xlim(0.9, 1.35 * n)
    axis.axvline(n, color="#606060", linewidth=0.8)
    axis.text(
        n, 0.98, f" N = {n:,}", transform=axis.get_xaxis_transform(), rotation=90, va="top", ha="left", fontsize=7
    )
    _floors(axis, [block for block in blocks.values() if block.above_floor.any()], bottom)
    model = model_name(spectrum)
    heading = f"{as_text(model)}: {matrix_name(spectrum)}" if model else matrix_name(spectrum).capitalize()
    of = f"blocks: {as_text(structure_name(spectrum))}" if len(spectrum.blocks) > 1 else "all parameters"
    unit = spectrum.metadata.get("sample_unit", "sample")
    partial = partial_prefix(spectrum).replace(": ", "\n")
    axis.set_title(f"{partial}{heading}\n{of}; {n:,} {unit}s", fontsize=10)
    axis.set_xlabel("index of the eigenvalue")
    axis.set_ylabel(f"eigenvalue, {eigenvalue_unit(spectrum)}")
    axis.grid(which="major", linewidth=0.4, alpha=0.5)
    axis.set_axisbelow(True)
    if len(blocks) > 1:
        label_lines(axis, styles, whole=spectrum.whole is not None)
        _numbers(axis, blocks, styles)


def _curve(axis: Any, block: Block, style: LineStyle, label: str, number: int) -> None:
    """Draw one block; the page finds its lines as `curve-NUMBER` and, below the floor, `faint-NUMBER`."""
    index = shown_indices(len(block.eigenvalues))
    values = block.eigenvalues[index - 1]
    above = block.above_floor[index - 1]
    below = ~above & (values > 0)
    look = {"color": style.colour, "linestyle": style.dashes}
    gid = f"curve-{number}"
    axis.loglog(index[above], values[above], linewidth=style.width, label=as_text(label), gid=gid, **look)
    if below.any():
        gid = f"faint-{number}"
        axis.loglog(index[below], values[below], linewidth=style.width / 2, alpha=0.25, gid=gid, **look)


def shown_indices(count: int) -> np.ndarray:
    """Return which indices of a curve of `count` points are drawn, from 1: all, or as many as an eye can tell apart."""
    if count <= _POINTS:
        return np.arange(1, count + 1)
    return np.unique(np.round(np.geomspace(1, count, _POINTS)).astype(np.int64))


def _floors(axis: Any, blocks: Sequence[Block], bottom: float | None) -> None:
    """Show where rounding begins to decide, or say that it is below."""
    floors = [block.noise_floor for block in blocks if block.noise_floor > 0]
    if not floors or bottom is None:
        return
    low, high = min(floors), max(floors)
    several = "noise floors" if high > 1.01 * low else "noise floor"
    between = f"{low:.1g} to {high:.1g}" if high > 1.01 * low else f"{high:.1g}"
    if high < bottom:
        said = f"{several} {between}: below this picture"
        axis.text(0.01, 0.015, said, transform=axis.transAxes, fontsize=7, color="#505050")
        return
    axis.axhspan(max(low, bottom), high, color="#808080", alpha=0.18, linewidth=0)
    axis.axhline(high, color="#606060", linewidth=0.8, linestyle=":")
    place = axis.get_yaxis_transform()
    axis.text(0.01, high, f"{several} {between}", transform=place, fontsize=7, color="#505050", va="bottom")


def label_lines(axis: Any, styles: Mapping[str, LineStyle], *, whole: bool = False) -> None:
    """Explain lines: a colour bar for depth where layers are many, a legend for what is left.

    Args:
        axis: on which the lines are.
        styles: of the lines, by name.
        whole: there is one of the whole model too.
    """
    from matplotlib.lines import Line2D

    scale = depth_scale(styles)
    layers = [name for name, style in styles.items() if style.depth is not None]
    if scale is None or len(layers) <= FEW_LAYERS:
        shown = {as_text(name): style for name, style in styles.items()}
    else:
        bar = axis.figure.colorbar(scale, ax=axis, label="layer", pad=0.02, aspect=32)
        bar.ax.yaxis.get_major_locator().set_params(integer=True)
        named = {name: style for name, style in styles.items() if style.depth is None}
        kinds = {kind_of(name): LineStyle("#404040", styles[name].dashes, 1.3) for name in layers}
        shown = {f"layers, {kind}" if kind else "layers": style for kind, style in kinds.items()}
        shown |= {as_text(name): style for name, style in _few(named).items()}
    if whole:
        shown[WHOLE] = WHOLE_STYLE
    handles = [
        Line2D([], [], color=style.colour, ls=style.dashes, linewidth=style.width, label=name)
        for name, style in shown.items()
    ]
    if len(handles) > _LEGEND:
        more = Line2D([], [], linestyle="", label=f"and {len(handles) - _LEGEND} more")
        handles = [*handles[:_LEGEND], more]
    columns = 4 if max((len(str(handle.get_label())) for handle in handles), default=0) < 18 else 2
    axis.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.15),
        ncols=columns,
        fontsize=7,
        frameon=False,
        handlelength=3.2,
    )


def _few(named: dict[str, LineStyle]) -> dict[str, LineStyle]:
    """Return names of their kinds where there are more parameters outside of layers than a legend can hold."""
    return named if len(named) <= _LEGEND // 2 else {kind_of(name): style for name, style in named.items()}


def _numbers(axis: Any, blocks: Mapping[str, Block], styles: Mapping[str, LineStyle]) -> None:
    """Put the numbers of layers on their lines, each at a place of its own: all of them where they are few."""
    layers = [name for name, style in styles.items() if style.depth is not None and blocks[name].above_floor.any()]
    if len(layers) < 2 or any("." in name for name in layers):
        return
    chosen = layers if len(layers) <= FEW_LAYERS else [layers[0], layers[len(layers) // 2], layers[-1]]
    for place, name in enumerate(chosen):
        block = blocks[name]
        count = int(block.above_floor.sum())
        at = round(count ** (0.12 + 0.5 * place / len(chosen)))
        axis.text(
            at,
            block.eigenvalues[min(at, count) - 1],
            str(styles[name].depth),
            fontsize=7,
            ha="center",
            va="center",
            bbox={
                "boxstyle": "round,pad=0.12",
                "facecolor": "white",
                "edgecolor": styles[name].colour,
                "linewidth": 0.7,
            },
        )


def band(axis: Any, drawn: BlockBootstrap, block: Block, colour: str) -> None:
    """Shade the intervals of a block's eigenvalues, as far as resamples have so many above the noise floor."""
    inside = block.above_floor[: len(drawn.eigenvalue_low)] & (drawn.eigenvalue_low > block.noise_floor)
    index = np.arange(1, len(inside) + 1)[inside]
    low, high = drawn.eigenvalue_low[inside], drawn.eigenvalue_high[inside]
    axis.fill_between(index, low, high, color=colour, alpha=0.2, linewidth=0)


def bottom_of(spectra: Iterable[Shown]) -> float | None:
    """Return where panels that share an axis begin: what is only rounding is not worth the room."""
    least = [value for value in map(smallest, spectra) if value is not None]
    return min(least) / 3 if least else None
