"""The whole table of operators: those on elements and those that reduce, and those that index."""

from . import indexing as indexing  # puts its operators into the table
from .operators import OPERATORS as OPERATORS
