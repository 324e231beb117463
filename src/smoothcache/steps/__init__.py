"""Steps of a sampler: predictors between them, noise levels, and other step counts."""

from .predictors import PREDICTORS as PREDICTORS
from .predictors import Predictor as Predictor
