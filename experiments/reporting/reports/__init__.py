"""One file for each kind of report: the Markdown that the pages show of it."""
