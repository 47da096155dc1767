"""An estimate as text, as HTML and as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen_vram.errors import BackendUnavailableError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from qwen_vram.arithmetic.estimate import Estimate

_LABELS = {
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


def rows(estimate: Estimate) -> list[tuple[str, int, float | None]]:
    """Label, bytes, and share of the allocated peak for the four parts; then the totals without a share."""
    shares = estimate.shares()
    sizes = [(name, label, getattr(estimate, name)) for name, label in _LABELS.items()]
    return [(label, size, shares.get(name)) for name, label, size in sizes if size or name != "disk"]


def headline(estimate: Estimate) -> str:
    """Model, profile and workload in one line, and the GPU whose context was measured; nothing of a stated default."""
    machine = estimate.machine
    if estimate.architecture is None or not machine.is_measured("cuda_context"):
        return _subject(estimate)
    return f"{_subject(estimate)} | CUDA context measured on {machine.device}, {machine.date}"


def _subject(estimate: Estimate) -> str:
    profile, workload = estimate.profile, estimate.workload
    compiled = ", compiled" if profile.compiled else ", captured" if profile.captured else ""
    return (
        f"{estimate.model} | {profile.name}: {profile.weights} weights, {profile.attention} attention, "
        f"{profile.cache} cache{compiled} | {workload.prompt_len:,} + {workload.max_new_tokens:,} tokens, "
        f"batch {workload.batch_size}{', padded' if workload.padded else ''}"
    )


def text(estimate: Estimate) -> str:
    """A plain table: bytes, GB (10**9), GiB (2**30) and shares."""
    lines = [headline(estimate), f"{'':22}{'bytes':>18}{'GB':>9}{'GiB':>9}{'share':>8}"]
    for label, size, share in rows(estimate):
        percent = "" if share is None else f"{share:8.1%}"
        lines.append(f"{label:22}{size:>18,}{size / 10**9:>9.2f}{size / 2**30:>9.2f}{percent}")
    if estimate.devices:
        lines.extend(f"{label:22}" + "".join(f"{cell:>18}" for cell in cells) for label, cells in by_device(estimate))
    return "\n".join(lines)


def by_device(estimate: Estimate) -> list[tuple[str, list[str]]]:
    """Label, and a text for each of several GPUs: its number, its layers, and its bytes part by part."""
    parts = list(estimate.devices.values())
    shapes = [part.architecture for part in parts if part.architecture]
    spans = [f"{one.first_layer}-{one.first_layer + one.num_hidden_layers - 1}" for one in shapes]
    table = [("GPU", [str(device) for device in estimate.devices]), ("layers", spans)]
    one_by_one = [(name, label) for name, label in _LABELS.items() if name != "disk"]  # streaming works on one GPU
    return table + [(label, [f"{getattr(part, name):,}" for part in parts]) for name, label in one_by_one]


def html(estimate: Estimate) -> str:
    """The same table for a notebook."""
    from html import escape  # slow to import, and only needed here

    head = "".join(f"<th>{name}</th>" for name in ("", "bytes", "GB", "GiB", "share"))
    body = []
    for label, size, share in rows(estimate):
        percent = "" if share is None else f"{share:.1%}"
        cells = (f"{size:,}", f"{size / 10**9:.2f}", f"{size / 2**30:.2f}", percent)
        numbers = "".join(f'<td style="text-align:right">{cell}</td>' for cell in cells)
        body.append(f'<tr><th style="text-align:left">{label}</th>{numbers}</tr>')
    for label, texts in by_device(estimate) if estimate.devices else ():
        each = "".join(f'<td style="text-align:right">{cell}</td>' for cell in texts)
        body.append(f'<tr><th style="text-align:left">{label}</th>{each}</tr>')
    caption = f"<caption>{escape(headline(estimate))}</caption>"
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def plot(estimate: Estimate) -> Axes:
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
    for name, size in estimate.parts().items():
        axes.barh([0], [size / 10**9], left=left, label=f"{_LABELS[name]} {size / 10**9:.2f} GB")
        left += size / 10**9
    axes.set(xlabel="GB (10^9 bytes) at the peak", yticks=[], title=_subject(estimate))
    axes.title.set_fontsize(9)
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.35), frameon=False)
    return axes
