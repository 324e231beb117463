"""Ways of sampling side by side: cost, time and quality, from the same seeds."""

from .benchmark import Aim as Aim
from .benchmark import Benchmark as Benchmark
from .benchmark import Case as Case
from .benchmark import Method as Method
from .benchmark import Verdict as Verdict
from .benchmark import run_benchmark as run_benchmark
from .compare import Variant as Variant
from .compare import compare as compare
from .compare import fewer_steps as fewer_steps
from .result import REFERENCE as REFERENCE
from .result import Comparison as Comparison
from .result import Duel as Duel
from .trial import Way as Way
