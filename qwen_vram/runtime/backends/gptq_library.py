"""Import of GPTQModel without its changes to the process.

Source of the changes: GPTQModel 7.6.0, gptqmodel/__init__.py and models/auto.py, tokenicer 0.0.14.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from io import StringIO

from qwen_vram.errors import BackendUnavailableError

INSTALL = 'pip install "qwen-vram[gptq]"'


def check_installed(what: str) -> None:
    """Refuse `what` if a library that it needs is missing.

    Raises:
        BackendUnavailableError: GPTQModel or optimum is not installed.
    """
    missing = [name for name in ("gptqmodel", "optimum") if find_spec(name) is None]
    if missing:
        raise BackendUnavailableError(
            f"{what} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; run: "
            f"{INSTALL} (auto-gptq does not import under transformers 5, and is not needed)",
            backend="gptq",
            install=INSTALL,
        )


def import_quietly() -> None:
    """Import GPTQModel without its banner, and restore the environment.

    The import runs in a thread. GPTQModel keeps an exception of its import, which keeps all frames below it with their
    variables. In the caller's thread these would be the frames of `load()` with the model. Source: GPTQModel 7.6.0,
    nn_modules/qlinear/gguf_cpp.py, `_LLAMA_CPP_IMPORT_ERROR`.
    """
    with ThreadPoolExecutor(1) as executor:
        executor.submit(_import).result()


def _import() -> None:
    """Import GPTQModel, and restore the settings that it changes.

    It sets torch's allocator and the order of GPUs if they are not set, and the hub's cache to a folder in /tmp.
    """
    before = dict(os.environ)
    # GPTQModel does not change variables that are set. These are the defaults of CUDA and torch.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:False")
    os.environ.setdefault("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # modules that it imports log warnings about missing libraries
    try:
        with redirect_stdout(StringIO()), quietly():
            import gptqmodel  # noqa: F401
            from gptqmodel.utils.logger import setup_logger

            setup_logger().setLevel("ERROR")
    finally:
        logging.disable(disabled)
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def quietly() -> Iterator[None]:
    """Suppress messages of Python, torch and transformers that GPTQModel and optimum cause, and that need no action."""
    logger = logging.getLogger("transformers.modeling_utils")
    with warnings.catch_warnings():
        # A folder for offloading, which a loaded quantized model does not use.
        warnings.filterwarnings("ignore", "Implicitly cleaning up", ResourceWarning)
        # optimum reads the value of every attribute of a model.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        logger.addFilter(_is_no_loss_type)
        try:
            yield
        finally:
            logger.removeFilter(_is_no_loss_type)


def _is_no_loss_type(record: logging.LogRecord) -> bool:
    return "loss_type=" not in record.getMessage()
