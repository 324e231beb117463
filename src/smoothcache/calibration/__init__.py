"""Error curves: what reusing a layer's output of earlier steps costs, measured on a few samples."""

from .calibrate import calibrate as calibrate
from .curves import Calibration as Calibration
from .curves import Curve as Curve
from .observe import observe_layers as observe_layers
