from .from_logps import preference_loss as preference_loss
from .fused import dpo_loss as dpo_loss
from .module import DPOLoss as DPOLoss
from .options import LossOptions as LossOptions
from .outputs import DPOOutput as DPOOutput
from .sequence_parallel import sum_over_group as sum_over_group
