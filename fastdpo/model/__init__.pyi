from .head import FusedHead as FusedHead
from .head import HeadOutput as HeadOutput
