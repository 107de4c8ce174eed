"""The whole table of operators: those on elements and those that reduce, and those that move or choose elements."""

from . import lookups as lookups  # each puts its operators into the table
from . import pieces as pieces
from . import reshaping as reshaping
from . import scatters as scatters
from . import views as views
from . import windows as windows
from .complexes import OPERATORS as COMPLEX_OPERATORS  # noqa: F401
from .operators import OPERATORS as OPERATORS
