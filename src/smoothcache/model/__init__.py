"""What the user handed over: denoisers, their arguments and outputs, and what they cost."""

from .arguments import Signature as Signature
from .denoisers import find_denoisers as find_denoisers
from .target import Target as Target
