"""Verdicts: words for a distance by its mean KL divergence."""

from __future__ import annotations

from typing import Literal

from qwen_vram.quality.intervals import Figure

Verdict = Literal["identical", "excellent", "good", "acceptable", "poor"]

# Upper limits of the mean KL divergence, in nats.
# Source: thresholds that users of llama.cpp's `llama-perplexity --kl-divergence` apply to the mean.
THRESHOLDS: tuple[tuple[Verdict, float], ...] = (("excellent", 0.01), ("good", 0.05), ("acceptable", 0.10))


def verdict(mean_kl: Figure) -> Verdict:
    """Return the word for the upper end of the interval, so that few documents do not give a better word."""
    if mean_kl.value == 0:
        return "identical"
    return next((word for word, most in THRESHOLDS if mean_kl.high < most), "poor")
