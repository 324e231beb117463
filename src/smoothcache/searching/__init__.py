"""Search for the best schedule within a budget, by measured rollouts."""

from .options import SearchOptions as SearchOptions
from .result import Measured as Measured
from .result import SearchedSchedule as SearchedSchedule
from .result import SearchResult as SearchResult
from .search import search as search
