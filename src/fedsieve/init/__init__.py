"""How the weights of a federation start."""

from fedsieve.init.schemes import glorot_uniform, kaiming_uniform

__all__ = ["glorot_uniform", "kaiming_uniform"]
