"""The process of one case, which it reads and answers as one line of JSON.

It ends when its standard input is closed, also if the process that started it was killed.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

# Characters of an error that are kept; some of torch's list every block.
_LONGEST = 500


def main() -> None:
    """Measure the case on standard input. What libraries print goes to standard error."""
    answer = os.dup(1)
    os.dup2(2, 1)
    data = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    os.write(answer, json.dumps(_measured(data)).encode() + b"\n")


def _measured(data: dict[str, Any]) -> dict[str, Any]:
    try:
        return _measure(data)
    except Exception as error:
        text = " ".join(str(error).split())
        return {"error": f"{type(error).__name__}: {text[:_LONGEST]}"}


def _measure(data: dict[str, Any]) -> dict[str, Any]:
    from qwen_vram.benchmark.case import Case

    if data["by"] == "transformers":
        from qwen_vram.benchmark.plain import measure_plain

        return measure_plain(Case(**data))
    from qwen_vram.benchmark.own import measure_own

    return measure_own(Case(**data))


def _end_with_the_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
