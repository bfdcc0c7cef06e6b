"""The HTML report of a trait's run, its plots, and the index of an experiment.

Pure functions from plain values to bytes; the markup is in `templates/`. May import `core`, `config` and the packages
up to `vectors`. Start at `page.report_page` and `plots.pictures`.
"""

from extraction.core.exports import lazy_exports

_EXPORTS = {
    "IndexEntry": "page",
    "Picture": "plot_style",
    "ReportData": "page_data",
    "index_page": "page",
    "pictures": "plots",
    "report_page": "page",
}
__all__ = list(_EXPORTS)
__getattr__ = lazy_exports(__name__, _EXPORTS)
