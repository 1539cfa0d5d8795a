"""The only list of methods: importing this package fills the registry. Each line also makes a configuration public."""

from .bone import BoneConfig as BoneConfig
from .bone import MissConfig as MissConfig
from .hra import HRAConfig as HRAConfig
from .loha import LoHaConfig as LoHaConfig
from .lora import LoraConfig as LoraConfig
from .oft import OFTConfig as OFTConfig
