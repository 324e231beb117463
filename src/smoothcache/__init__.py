"""Faster sampling from diffusion transformers, without training.

Finds the layers whose output hardly changes between denoising steps, measures on a few samples
what reusing them costs, plans a static schedule, and runs the user's own pipeline with it.
"""

from .apply import Run as Run
from .apply import cached as cached
from .apply import enable as enable
from .calibrate import calibrate as calibrate
from .calibration import Calibration as Calibration
from .calibration import Curve as Curve
from .errors import AlreadyCachedError as AlreadyCachedError
from .errors import CalibrationError as CalibrationError
from .errors import FileFormatError as FileFormatError
from .errors import InvalidArgumentError as InvalidArgumentError
from .errors import LayersNotFoundError as LayersNotFoundError
from .errors import ScheduleMismatchError as ScheduleMismatchError
from .errors import SmoothCacheError as SmoothCacheError
from .errors import SmoothCacheWarning as SmoothCacheWarning
from .layers import CacheLayer as CacheLayer
from .layers import find_layers as find_layers
from .learn import learn_routers as learn_routers
from .observe import observe_layers as observe_layers
from .planners import plan as plan
from .planners import plan_learned as plan_learned
from .predictors import PREDICTORS as PREDICTORS
from .routers import Routers as Routers
from .schedule import Row as Row
from .schedule import Schedule as Schedule
from .search import SearchedSchedule as SearchedSchedule
from .search import SearchResult as SearchResult
from .search import search as search
from .summary import Summary as Summary
from .version import __version__ as __version__
from .version import refuse_namesake

refuse_namesake()
del refuse_namesake
