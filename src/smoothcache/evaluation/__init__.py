"""Evaluation at scale: metrics of folders of samples, and of schedules side by side, over ranks."""

from .evaluate import evaluate as evaluate
from .figures import draw_figures as draw_figures
from .networks import LOADERS as LOADERS
from .registry import METRICS as METRICS
from .registry import Metric as Metric
from .schedules import Candidate as Candidate
from .schedules import evaluate_schedules as evaluate_schedules
from .table import EvaluationRow as EvaluationRow
from .table import EvaluationTable as EvaluationTable
