"""The user's model: denoisers, their arguments and outputs, and their costs."""

from .arguments import Signature as Signature
from .denoisers import find_denoisers as find_denoisers
from .target import Target as Target
