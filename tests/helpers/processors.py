"""Logits processors of tests."""

from transformers import LogitsProcessor


class At(LogitsProcessor):
    """Calls something at the `step`-th token."""

    def __init__(self, step, call):
        self.step, self.call, self.steps = step, call, 0

    def __call__(self, input_ids, scores):
        self.steps += 1
        if self.steps == self.step:
            self.call()
        return scores
