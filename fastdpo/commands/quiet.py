"""Lines that other libraries print, about nothing that the person at the command has asked for or could change.

Each is named here, with its cause, which is not ours to remove. The command alone asks for this: in a program of
somebody's own, what is logged is theirs to decide.
"""

from __future__ import annotations

import logging
import warnings


def hush_other_libraries() -> None:
    """Filter those lines out, from here on."""
    # transformers' trainer imports PEFT, and PEFT imports bitsandbytes wherever it is installed, also when nobody asks
    # for 4 or 8 bits. On a CPU with AVX512-BF16 that looks for a faster product of 4-bit weights, in a package which
    # it does not depend on, and warns that it has not found it; it then takes a product of its own.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_not_about_kernels)
    # PEFT (0.21.2) asks every model that it wraps for this property, which transformers (5.24) has renamed.
    warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)


def _is_not_about_kernels(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward from kernels-community")
