"""Runs -> tables, plots, one self-contained HTML page.

    report.write("runs/demo")                     # reads results.json, writes report.html and plots/ beside it
    report.summary_tables(results)                # the same tables for the terminal

`results` says what results.json may hold, `verdict` puts its numbers into words, `tables` and `plots` show them,
`page` lays them out.
"""

from elision.report.page import summary_tables, write

__all__ = ["summary_tables", "write"]
