"""Studies: declared in a file, run row by row, shown as tables, figures and a page."""
