"""Runs -> tables, plots, one self-contained HTML page.

    report.write("runs/demo")                     # reads results.json, writes report.html and plots/ beside it
    report.write(["runs/a", "plan.json"], "both") # several runs, plans and benchmarks on one page
    report.summary_tables(results)                # the same tables for the terminal

`results` says what results.json may hold, `sources` reads it and what else a page can be made of, `verdict` puts its
numbers into words, `tables`, `plots` and `measured` show them, `page` lays them out.
"""

from elision.report.page import summary_tables, write

__all__ = ["summary_tables", "write"]
