"""The plan of a run: which layers are computed at which steps, and what it costs."""

from .expected_cost import compute_fraction as compute_fraction
from .export import StepPlan as StepPlan
from .row import Row as Row
from .schedule import Schedule as Schedule
