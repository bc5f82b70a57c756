from .fused import DPOLoss as DPOLoss
from .fused import dpo_loss as dpo_loss
from .fused import preference_loss as preference_loss
from .options import LossOptions as LossOptions
from .outputs import DPOOutput as DPOOutput
from .sequence_parallel import sum_over_group as sum_over_group
