"""The primitive: log-probabilities of targets from hidden states and the output embedding, without their logits."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
