"""Running a model under a schedule."""

from .run import Run as Run
from .run import Store as Store
from .run import cached as cached
from .run import enable as enable
from .summary import Summary as Summary
