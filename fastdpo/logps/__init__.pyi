from .device_paths import build_info as build_info
from .low_rank import LowRankUpdate as LowRankUpdate
from .ops import OUTPUTS as OUTPUTS
from .outputs import TokenLogps as TokenLogps
from .primitive import DEFAULT_RETAIN_BYTES as DEFAULT_RETAIN_BYTES
from .primitive import token_logps as token_logps
