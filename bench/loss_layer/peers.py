"""The ways to compute a DPO step that are measured, each in its best setting: all of them, by name.

Every peer computes the reference's pass first and without a graph, which needs least memory. A peer is a subclass of
``Peer`` with a name; it may stand in ``ours.py`` or ``public.py``, or in a file of its own, named by --peer_file.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from loss_layer import ours, public
from loss_layer.peer import PEERS, Peer, TokenPeer

__all__ = ["PEERS", "DEFINED_IN", "Peer", "TokenPeer", "load_peer_file"]

# A peer is entered when its class is made.
DEFINED_IN = (ours, public)


def load_peer_file(file: Path) -> None:
    """Adds the peers that a Python file defines."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None, f"{file} is no Python file"
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
