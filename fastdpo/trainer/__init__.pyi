from .config import DPOConfig as DPOConfig
from .trainer import DPOTrainer as DPOTrainer
