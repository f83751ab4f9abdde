"""Pictures, the HTML page and the terminal table of one finished pipeline run."""
