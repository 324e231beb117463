"""Layers that can be reused between steps: found by structure, confirmed by observing a run."""

from .find import find_layers as find_layers
from .layer import CacheLayer as CacheLayer
from .layer import Granularity as Granularity
from .layer import ModelIdentity as ModelIdentity
from .layer import Select as Select
from .layer import is_residual as is_residual
from .modules import identify as identify
from .modules import layer_modules as layer_modules
