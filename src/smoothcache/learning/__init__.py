"""Learning-to-Cache: trained routers that decide which layers to reuse."""

from .learn import learn_routers as learn_routers
from .plan import plan_learned as plan_learned
from .routers import Routers as Routers
