"""Reports: what was measured as one HTML file that needs nothing else to be read."""

from .environment import environment as environment
from .page import Fact as Fact
from .page import Page as Page
from .page import write_page as write_page
from .pages import benchmark_page as benchmark_page
from .pages import comparison_page as comparison_page
from .pages import search_page as search_page
from .pages import table_page as table_page
