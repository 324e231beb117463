"""The only room that imports diffusers: loading pipelines, choosing solvers, sampling."""

from .grid import scheduler_on_grid as scheduler_on_grid
from .loading import INDEX as INDEX
from .loading import load_pipeline as load_pipeline
from .loading import silence_libraries as silence_libraries
from .sampler import PipelineSampler as PipelineSampler
from .sampler import sampling_rate as sampling_rate
from .sampler import steps_to_ask_for as steps_to_ask_for
from .solvers import multistep_solvers as multistep_solvers
from .solvers import suitable_solvers as suitable_solvers
from .solvers import third_order_sde as third_order_sde
