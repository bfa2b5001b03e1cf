"""Reading the engines' metrics: when to poll, the poll, the page, and what a window of pages says."""
