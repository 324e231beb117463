"""Weights of reused outputs, fitted along the run that they themselves make."""

from .closed_loop import fit as fit
from .trajectory_search import search_trajectory as search_trajectory
