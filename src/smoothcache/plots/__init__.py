"""Figures of calibrations, schedules, methods and samples."""

from .curves import composition as composition
from .curves import plot_composition as plot_composition
from .curves import plot_error_curves as plot_error_curves
from .eligible import plot_eligible_layers as plot_eligible_layers
from .methods import plot_methods as plot_methods
from .samples import animate_clip_grid as animate_clip_grid
from .samples import plot_image_grid as plot_image_grid
from .samples import plot_spectrograms as plot_spectrograms
from .schedule import plot_schedule as plot_schedule
from .style import KIND_COLOURS as KIND_COLOURS
from .style import KIND_NAMES as KIND_NAMES
from .teaser import Panel as Panel
from .teaser import plot_teaser as plot_teaser
