"""Rendering of an estimate as text, HTML and a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from qwen_vram.errors import BackendUnavailableError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Names of an estimate's sizes, and their labels.
SHOWN = {
    "weights": "weights",
    "kv_cache": "KV cache",
    "activations": "activations",
    "workspace": "workspace",
    "peak_allocated": "peak allocated",
    "peak_reserved": "peak reserved",
    "process_total": "process (nvidia-smi)",
    "load_peak": "load peak",
    "host": "host memory",
    "disk": "read from disk",
}


class Shown(NamedTuple):
    """The texts and figures of an estimate for display.

    Attributes:
        subject: Model, profile and workload in one line.
        headline: The same, with the GPU whose CUDA context was measured, if one was.
        sizes: Bytes by the names of `SHOWN`.
        shares: Shares of the allocated peak, by the names of its parts.
        devices: For each of several GPUs its number, the span of its layers, and its bytes by the names of `SHOWN`.
    """

    subject: str
    headline: str
    sizes: dict[str, int]
    shares: dict[str, float]
    devices: tuple[tuple[int, str, dict[str, int]], ...]


def rows(shown: Shown) -> list[tuple[str, int, float | None]]:
    """Return label, bytes, and share of the allocated peak for the four parts; then the totals without a share."""
    sizes = [(name, SHOWN[name], size) for name, size in shown.sizes.items()]
    return [(label, size, shown.shares.get(name)) for name, label, size in sizes if size or name != "disk"]


def text(shown: Shown) -> str:
    """A plain table: bytes, GB (10**9), GiB (2**30) and shares."""
    lines = [shown.headline, f"{'':22}{'bytes':>18}{'GB':>9}{'GiB':>9}{'share':>8}"]
    for label, size, share in rows(shown):
        percent = "" if share is None else f"{share:8.1%}"
        lines.append(f"{label:22}{size:>18,}{size / 10**9:>9.2f}{size / 2**30:>9.2f}{percent}")
    if shown.devices:
        lines.extend(f"{label:22}" + "".join(f"{cell:>18}" for cell in cells) for label, cells in by_device(shown))
    return "\n".join(lines)


def by_device(shown: Shown) -> list[tuple[str, list[str]]]:
    """Return a label, and a text for each of several GPUs: its number, its layers, and its bytes part by part."""
    table = [
        ("GPU", [str(device) for device, _, _ in shown.devices]),
        ("layers", [span for _, span, _ in shown.devices]),
    ]
    one_by_one = [(name, label) for name, label in SHOWN.items() if name != "disk"]  # streaming works on one GPU
    return table + [(label, [f"{sizes[name]:,}" for _, _, sizes in shown.devices]) for name, label in one_by_one]


def html(shown: Shown) -> str:
    """An HTML table of the same cells, for a notebook."""
    from html import escape  # slow to import, and only needed here

    head = "".join(f"<th>{name}</th>" for name in ("", "bytes", "GB", "GiB", "share"))
    body = []
    for label, size, share in rows(shown):
        percent = "" if share is None else f"{share:.1%}"
        cells = (f"{size:,}", f"{size / 10**9:.2f}", f"{size / 2**30:.2f}", percent)
        numbers = "".join(f'<td style="text-align:right">{cell}</td>' for cell in cells)
        body.append(f'<tr><th style="text-align:left">{label}</th>{numbers}</tr>')
    for label, texts in by_device(shown) if shown.devices else ():
        each = "".join(f'<td style="text-align:right">{cell}</td>' for cell in texts)
        body.append(f'<tr><th style="text-align:left">{label}</th>{each}</tr>')
    caption = f"<caption>{escape(shown.headline)}</caption>"
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def plot(shown: Shown) -> Axes:
    """One horizontal bar of the four parts in GB (10**9)."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        install = 'pip install "qwen-vram[plot]"'
        raise BackendUnavailableError(
            f"plot() needs matplotlib, which is not installed; run: {install}", backend="matplotlib", install=install
        ) from error
    axes: Axes
    _, axes = pyplot.subplots(figsize=(9, 2.2), layout="constrained")
    left = 0.0
    for name in shown.shares:
        size = shown.sizes[name]
        axes.barh([0], [size / 10**9], left=left, label=f"{SHOWN[name]} {size / 10**9:.2f} GB")
        left += size / 10**9
    axes.set(xlabel="GB (10^9 bytes) at the peak", yticks=[], title=shown.subject)
    axes.title.set_fontsize(9)
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.35), frameon=False)
    return axes
