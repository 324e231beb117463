"""All of it in one call: calibrate, plan, measure on unseen samples, and enable."""

from .accelerate import accelerate as accelerate
from .cache import CalibrationCache as CalibrationCache
from .cache import CalibrationEntry as CalibrationEntry
from .report import AccelerationReport as AccelerationReport
from .report import MeasuredWay as MeasuredWay
