"""Faster sampling from diffusion transformers, without training.

Finds the layers whose output hardly changes between denoising steps, measures on a few samples
what reusing them costs, plans a static schedule, and runs the user's own pipeline with it.
"""

from typing import TYPE_CHECKING, Any

from .calibration import Calibration as Calibration
from .calibration import Curve as Curve
from .calibration import calibrate as calibrate
from .calibration import observe_layers as observe_layers
from .errors import AlreadyCachedError as AlreadyCachedError
from .errors import CalibrationError as CalibrationError
from .errors import FileFormatError as FileFormatError
from .errors import InvalidArgumentError as InvalidArgumentError
from .errors import LayersNotFoundError as LayersNotFoundError
from .errors import MissingPackageError as MissingPackageError
from .errors import PipelineLoadError as PipelineLoadError
from .errors import ScheduleMismatchError as ScheduleMismatchError
from .errors import SmoothCacheError as SmoothCacheError
from .errors import SmoothCacheWarning as SmoothCacheWarning
from .fitting import fit as fit
from .fitting import search_trajectory as search_trajectory
from .layers import CacheLayer as CacheLayer
from .layers import find_layers as find_layers
from .learning import Routers as Routers
from .learning import learn_routers as learn_routers
from .learning import plan_learned as plan_learned
from .planners import plan as plan
from .planners import plan_timesteps as plan_timesteps
from .planners import plan_trajectory as plan_trajectory
from .runtime import Run as Run
from .runtime import Summary as Summary
from .runtime import cached as cached
from .runtime import enable as enable
from .schedule import Row as Row
from .schedule import Schedule as Schedule
from .searching import SearchedSchedule as SearchedSchedule
from .searching import SearchOptions as SearchOptions
from .searching import SearchResult as SearchResult
from .searching import search as search
from .steps import PREDICTORS as PREDICTORS
from .version import __version__ as __version__
from .version import refuse_namesake as _refuse_namesake

if TYPE_CHECKING:
    from .acceleration import accelerate as accelerate
    from .comparison import Variant as Variant
    from .comparison import compare as compare

_refuse_namesake()


def __getattr__(name: str) -> Any:
    """Loads the comparison, and the metrics with it, when it is first asked for."""
    if name == "accelerate":
        from . import acceleration

        return acceleration.accelerate
    if name in ("Variant", "compare"):
        from . import comparison

        return getattr(comparison, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
