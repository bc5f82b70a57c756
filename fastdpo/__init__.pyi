from . import data as data
from . import integrations as integrations
from . import logps as logps
from . import loss as loss
from . import model as model
from . import ref_cache as ref_cache
from . import report as report
from . import trainer as trainer
from .logps.device_paths import build_info as build_info
from .logps.low_rank import LowRankUpdate as LowRankUpdate
from .logps.outputs import TokenLogps as TokenLogps
from .logps.primitive import token_logps as token_logps
from .loss.from_logps import preference_loss as preference_loss
from .loss.fused import dpo_loss as dpo_loss
from .loss.module import DPOLoss as DPOLoss
from .loss.options import LossOptions as LossOptions
from .loss.outputs import DPOOutput as DPOOutput
from .loss.sequence_parallel import sum_over_group as sum_over_group
from .trainer.config import DPOConfig as DPOConfig
from .trainer.trainer import DPOTrainer as DPOTrainer

__version__: str
