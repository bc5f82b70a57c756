"""fastdpo: Direct Preference Optimisation from hidden states, with no logits in memory.

Names are imported when they are used: the command answers without torch, and whoever needs the loss alone does not wait
for transformers.
"""

from importlib.metadata import version as _version

import lazy_loader as _lazy_loader

__version__ = _version("fastdpo")
__getattr__, __dir__, __all__ = _lazy_loader.attach_stub(__name__, __file__)
