from .code_books import CODE_BOOKS, normal_float_levels
from .ops import weighted_gather_records
from .row_layout import QUANTISATIONS, Quantisation, RowLayout

__all__ = [
    "CODE_BOOKS",
    "QUANTISATIONS",
    "Quantisation",
    "RowLayout",
    "normal_float_levels",
    "weighted_gather_records",
]
