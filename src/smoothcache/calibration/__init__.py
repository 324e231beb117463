"""Error curves: the measured error of reusing a layer's output from earlier steps."""

from .calibrate import calibrate as calibrate
from .curves import Calibration as Calibration
from .curves import Curve as Curve
from .observe import observe_layers as observe_layers
